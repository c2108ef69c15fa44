// Who works for this store.

import { fill, h, when } from "./dom.js";
import { get } from "./api.js";

export async function show(view, { signal }) {
  const body = h("tbody");
  view.append(h("h1", {}, "Workers"), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Worker", "Status", "Hardware", "Memory", "Cloud", "Pod", "Last heard of"].map((title) => h("th", { scope: "col" }, title)))), body)));
  while (!signal.aborted) {
    const workers = await get("/api/workers", {}, signal);
    fill(body, workers.length ? workers.map((worker) => h("tr", {}, h("td", { class: "mono wrap" }, worker.id), h("td", {}, worker.status), h("td", {}, worker.hardware), h("td", { class: "number" }, worker.vram_gb ? `${worker.vram_gb} GB` : "–"), h("td", {}, worker.cloud || "–"), h("td", { class: "mono" }, worker.pod || "–"), h("td", {}, when(worker.pinged)))) : h("tr", {}, h("td", { class: "empty", colspan: 7 }, "No workers. On this machine one starts when a job is submitted.")));
    await new Promise((resolve) => { setTimeout(resolve, 3000); });
  }
}

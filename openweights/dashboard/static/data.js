// Stored files: rows as they are read, what is learned in colour, lengths, what would be refused.

import { fill, h, notice, size, when } from "./dom.js";
import { file as filePath, get, post } from "./api.js";
import { draw } from "./charts.js";
import { to } from "./route.js";

const DATASETS = new Set(["conversations", "preference", "preferences", "multiple_choice", "result"]);
const PAGE = 20;

export async function show(view, { id, signal }) {
  if (id) return one(view, id, signal);
  const purpose = h("select", { "aria-label": "Purpose" }, ["conversations", "preference", "multiple_choice"].map((name) => h("option", {}, name)));
  const table = h("tbody");
  view.append(h("h1", {}, "Data"), drop(), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["File", "Name", "Purpose", "Size", "Stored"].map((title) => h("th", { scope: "col" }, title)))), table)));
  await list();

  function drop() {
    const chooser = h("input", { type: "file", "aria-label": "Choose a file", onchange: () => upload(chooser.files[0]) });
    const zone = h("div", { class: "drop", ondragover: (event) => { event.preventDefault(); zone.classList.add("over"); }, ondragleave: () => zone.classList.remove("over"), ondrop: (event) => { event.preventDefault(); zone.classList.remove("over"); upload(event.dataTransfer.files[0]); } },
      "Drop a JSON-lines file here, or ", chooser, h("label", {}, " as ", purpose));
    return zone;
  }

  async function upload(chosen) {
    if (!chosen) return;
    const form = new FormData();
    form.append("file", chosen);
    form.append("purpose", purpose.value);
    try {
      const stored = await post("/api/files", form);
      notice(`${stored.filename} is ${stored.id}`);
      await list();
    } catch (error) { notice(error.message, true); }
  }

  async function list() {
    const files = (await get("/api/files", {}, signal)).filter(({ purpose: kind }) => DATASETS.has(kind));
    fill(table, files.length ? files.map((file) => h("tr", { "data-row": file.id }, h("td", { class: "mono" }, h("a", { href: to("data", file.id) }, file.id)), h("td", { class: "wrap" }, file.filename), h("td", {}, file.purpose), h("td", { class: "number" }, size(file.bytes)), h("td", {}, when(file.created_at)))) : h("tr", {}, h("td", { colspan: 5, class: "empty" }, "No datasets yet: drop one above.")));
  }
}

async function one(view, id, signal) {
  const rows = h("div"), facts = h("div"), chart = h("div", { class: "chart", role: "img", "aria-label": "histogram of lengths" });
  let offset = 0;
  view.append(h("h1", { class: "mono" }, id), h("div", { class: "bar" }, h("a", { href: `${filePath(id)}/content`, download: true }, "Download"), h("a", { href: to("new", "", { training_file: id }) }, "Train on it")), facts, chart, rows);
  await page();
  const summary = await get(`${filePath(id)}/summary`, {}, signal);
  const problems = summary.problems;
  fill(facts, h("p", {}, `${summary.rows.toLocaleString("en")} rows. Marked text is what a model learns; the rest is what it reads.`),
    problems.length ? h("details", { open: true }, h("summary", { class: "problem" }, "Rows that would be refused"), h("pre", { class: "problem" }, problems.join("\n"))) : null);
  const { edges, counts } = summary.characters;
  await draw(chart, [{ type: "bar", x: counts.map((_, at) => (edges[at] + edges[at + 1]) / 2), y: counts, name: "rows" }], { showlegend: false, bargap: 0.05, xaxis: { title: { text: "characters of a row" } }, yaxis: { title: { text: "rows" } } });

  async function page() {
    const found = await get(`${filePath(id)}/rows`, { offset, limit: PAGE }, signal);
    const move = (by) => { offset = Math.max(offset + by, 0); page().catch((error) => notice(error.message, true)); };
    fill(rows, h("div", { class: "bar" }, h("button", { type: "button", disabled: offset === 0, onclick: () => move(-PAGE) }, "Earlier"), h("button", { type: "button", disabled: !found.more, onclick: () => move(PAGE) }, "Later"), h("span", { class: "faint" }, `from row ${offset + 1}`)),
      found.rows.map((row) => h("section", { class: "panel" }, h("h3", {}, `line ${row.line}`), row.parts.map((part) => h("div", { class: part.learned ? "part learned" : "part" }, h("span", { class: "role" }, part.role), part.text)),
        Object.keys(row.other).length > 0 && h("pre", {}, JSON.stringify(row.other, null, 1)))));
  }
}

// A run's log: a window on it, however long it is; follows what comes, and searches on the server.

import { fill, h, notice, size } from "./dom.js";
import { get } from "./api.js";

const WINDOW = 1 << 18;
const KEPT = 3 * WINDOW;

export function logView(runs, first, signal) {
  let run = first, from = 0, to = 0, total = 0, busy = false;
  const text = h("div", { class: "log mono", tabindex: "0", role: "log", "aria-label": "log" });
  const place = h("span", { class: "faint" });
  const follow = h("input", { type: "checkbox", checked: true });
  const results = h("div");
  const search = h("input", { type: "search", placeholder: "Find in the log", "aria-label": "Find in the log" });
  const choice = h("select", { "aria-label": "Run", onchange: () => { run = Number(choice.value); open(); } }, runs.map(({ id }) => h("option", { value: id, selected: id === first }, `run ${id}`)));

  async function open(offset = -WINDOW) {
    const piece = await get(`/api/runs/${run}/log`, { offset, limit: WINDOW }, signal);
    [from, to, total] = [piece.offset, piece.next, piece.size];
    text.textContent = piece.text;
    if (offset < 0) text.scrollTop = text.scrollHeight;
    else { text.scrollTop = 0; follow.checked = false; }
    label();
    return piece;
  }

  async function more() {
    if (busy) return null;
    busy = true;
    try {
      const piece = await get(`/api/runs/${run}/log`, { offset: to, limit: WINDOW }, signal);
      total = piece.size;
      if (piece.text) {
        text.append(piece.text);
        to = piece.next;
        if (to - from > KEPT) await open();   // what scrolled far out of sight is let go
        else if (follow.checked) text.scrollTop = text.scrollHeight;
      }
      label();
      return piece;
    } finally { busy = false; }
  }

  function label() { place.textContent = `${size(from)} to ${size(to)} of ${size(total)}`; }

  async function find(event) {
    event.preventDefault();
    if (!search.value) { fill(results); return; }
    const found = await get(`/api/runs/${run}/log/search`, { text: search.value }, signal).catch((error) => { notice(error.message, true); return []; });
    fill(results, found.length ? h("ul", { class: "mono" }, found.map(({ offset, line }) => h("li", {}, h("button", { type: "button", class: "quiet", onclick: () => open(offset) }, line || " ")))) : h("p", { class: "faint" }, "Nothing found."));
  }

  async function live() {
    let piece = await open();
    while (!signal.aborted && !piece?.ended) {
      await new Promise((resolve) => { setTimeout(resolve, 1000); });
      if (follow.checked && !document.hidden) piece = (await more()) || piece;
    }
  }

  live().catch((error) => { if (!signal.aborted) notice(error.message, true); });
  return h("section", {}, h("div", { class: "bar" }, runs.length > 1 && choice, h("form", { class: "bar", style: "margin:0", onsubmit: find }, search, h("button", {}, "Find")),
    h("label", {}, follow, "Follow"),
    h("button", { type: "button", onclick: () => open(Math.max(from - WINDOW, 0)) }, "Earlier"),
    h("button", { type: "button", onclick: () => open(Math.max(Math.min(to, total - WINDOW), 0)) }, "Later"),
    h("button", { type: "button", onclick: () => open().then(() => { follow.checked = true; }) }, "End"), place), results, text);
}

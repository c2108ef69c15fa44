// A run's log: a window on it, however long it is; follows what comes, and searches on the server.
// Each piece is an element of its own, so that what comes is laid out without what stands there.

import { fill, h, notice, pause, size } from "./dom.js";
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
    fill(text);
    append(piece.text);
    if (offset < 0) text.scrollTop = text.scrollHeight;
    else { text.scrollTop = 0; follow.checked = false; }
    label();
    return piece;
  }

  function append(added) {
    const last = text.lastChild;
    const cut = last && !last.textContent.endsWith("\n") ? added.indexOf("\n") + 1 || added.length : 0;
    if (cut) last.append(added.slice(0, cut));
    if (added.length > cut) text.append(h("div", {}, added.slice(cut)));
  }

  async function more() {
    if (busy) return null;
    busy = true;
    try {
      const piece = await get(`/api/runs/${run}/log`, { offset: to, limit: WINDOW }, signal);
      total = piece.size;
      // What scrolled far out of sight is let go; so is what comes faster than anybody reads.
      if (piece.next - from > KEPT || total - piece.next > WINDOW) return await open();
      if (piece.text) {
        append(piece.text);
        to = piece.next;
        text.scrollTop = text.scrollHeight;
      }
      label();
      return piece;
    } finally { busy = false; }
  }

  function label() { place.textContent = total === 0 ? "empty" : `${size(from)} to ${size(to)} of ${size(total)}`; }

  async function find(event) {
    event?.preventDefault();
    fill(results);
    if (search.value) await matches(0);
  }

  async function matches(after) {
    const wanted = search.value;
    const found = await get(`/api/runs/${run}/log/search`, { text: wanted, after }, signal).catch((error) => { notice(error.message, true); return { lines: [] }; });
    if (wanted !== search.value) return;
    if (!found.lines.length && !after) { fill(results, h("p", { class: "faint" }, "Nothing found.")); return; }
    results.querySelector(".more")?.remove();
    results.append(h("ul", { class: "mono found" }, found.lines.map(({ offset, line }) => h("li", {}, h("button", { type: "button", class: "quiet", onclick: () => open(offset) }, line || " ")))),
      found.more ? h("button", { type: "button", class: "more", onclick: () => matches(found.lines.at(-1).offset + 1) }, "More") : "");
  }

  async function live() {
    let piece = await open();
    while (!signal.aborted && !(piece?.ended && piece.next >= piece.size)) {
      await pause(1000);
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

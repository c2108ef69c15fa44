// What was asked and answered: problems down; models, or steps of a training, across.

import { breakable, fill, h, notice, number } from "./dom.js";
import { get, job as jobPath } from "./api.js";
import { current, remember } from "./route.js";

const PAGE = 20;
const ONLY = { all: "all", scores: "scores differ", texts: "answers differ", wrong: "not all right" };
const UNCHECKED = { wrong: "not all 1" };
const LONG = 600; // characters: their box can be scrolled

/** The sheets of a job, one at a time; says whether there are any. */
export async function sheetsView(place, id, signal) {
  const names = await get(`${jobPath(id)}/sheets`, {}, signal);
  if (!names.length) return false;
  const { query } = current();
  let name = names.includes(query.sheet) ? query.sheet : names[0], only = query.only in ONLY ? query.only : "all", offset = 0, asked = 0;
  const choice = h("select", { "aria-label": "Answers to", onchange: () => turn({ name: choice.value, only: "all" }) }, names.map((one) => h("option", { value: one, selected: one === name }, one)));
  const filter = h("select", { "aria-label": "Show", onchange: () => turn({ only: filter.value }) });
  const where = h("span", { class: "faint" }), earlier = button("Earlier", -PAGE), later = button("Later", PAGE), body = h("div");
  fill(place, h("div", { class: "bar" }, h("label", {}, "Answers to ", choice), h("label", {}, "show ", filter), h("span", { class: "spread" }), where, earlier, later), body);
  await render();
  return true;

  function button(title, by) {
    return h("button", { type: "button", onclick: () => turn({ offset: Math.max(offset + by, 0) }) }, title);
  }

  function turn(what) {
    ({ name, only, offset } = { name, only, offset: 0, ...what });
    remember({ sheet: name, only: only === "all" ? "" : only });
    render().catch((error) => { if (!signal.aborted) notice(error.message, true); });
  }

  async function render() {
    const mine = (asked += 1);
    const found = await get(`${jobPath(id)}/sheets/${encodeURIComponent(name)}`, { only, offset, limit: PAGE }, signal);
    if (mine !== asked) return;
    const total = found.counts[only], several = found.columns.length > 1, scored = found.columns.some(({ score }) => score !== null);
    const kinds = Object.keys(ONLY).filter((kind) => kind === "all" || kind === only || (kind === "wrong" ? scored : several && (scored || kind === "texts")));
    fill(filter, kinds.map((kind) => h("option", { value: kind, selected: kind === only }, `${(!found.marks && UNCHECKED[kind]) || ONLY[kind]} (${found.counts[kind]})`)));
    filter.parentElement.hidden = kinds.length < 2;
    where.textContent = total > PAGE ? `${offset + 1} to ${Math.min(offset + PAGE, total)} of ${total}` : "";
    earlier.hidden = later.hidden = total <= PAGE;
    earlier.disabled = offset === 0;
    later.disabled = offset + PAGE >= total;
    fill(body, found.rows.length ? table(found) : h("p", { class: "empty" }, "No problem fits this filter."));
  }
}

function table({ columns, rows, marks }) {
  const head = ({ name, score, problems }) => h("th", { scope: "col" }, h("span", { class: "clip", title: name }, breakable(name)), score !== null && h("div", {}, result(score, problems, marks)));
  return h("div", { class: "scroll" }, h("table", { class: "sheet", style: `min-width:${15 * (columns.length + 1)}rem` },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Asked"), columns.map(head))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("th", { scope: "row" }, question(row)),
      row.answers.map((own, at) => h("td", {}, columns.length > 1 && h("div", { class: "role narrow" }, columns[at].name), own.length ? own.map((one) => answer(one, marks)) : "–")))))));
}

/** How many are right; where that is no whole number of problems, their mean. */
function result(score, problems, marks) {
  const right = Math.round(score * problems);
  return marks && Math.abs(score * problems - right) < 1e-6 ? `${right} of ${problems} right` : `mean ${number(score)}, ${problems} problem${problems === 1 ? "" : "s"}`;
}

/** The last message; what stands before it, as worked examples do, on demand. */
function question({ line, messages, reference }) {
  const before = messages.slice(0, -1), last = messages.at(-1);
  return [h("div", { class: "role" }, `${line}`), before.length > 0 && h("details", {}, h("summary", {}, before.length === 1 ? `the ${before[0].role} message` : `${before.length} messages before`), before.map(({ role, text }) => [h("div", { class: "role" }, role), said(text)])),
    last && said(last.text), reference && [h("div", { class: "role" }, "expected"), said(reference)]];
}

function answer({ text, score, note }, marks) {
  const mark = score === null ? null : !marks ? h("b", {}, number(score)) : score === 1 ? h("b", { class: "completed" }, "✓ right") : h("b", { class: "failed" }, "✗ wrong");
  return h("div", { class: "given" }, (mark || note) && h("div", { class: "mark" }, mark, mark && note && " · ", note), said(text || "(nothing)"));
}

const said = (text) => h("div", { class: "said", tabindex: text.length > LONG ? 0 : null }, text);

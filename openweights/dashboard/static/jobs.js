// The table of jobs: live, filtered on the server, with a line of each row's loss, or reward.

import { afterTyping, ago, ask, breakable, fill, h, notice, number, shortModel, shortText, status, svg, valueText, when } from "./dom.js";
import { get, job as jobPath, post } from "./api.js";
import { library } from "./charts.js";
import { remember, to } from "./route.js";

const COLUMNS = {
  status: { title: "Status", sort: "status", cell: (row) => status(row.status, row.status_word) },
  id: { title: "Job", sort: "id", cell: (row) => h("a", { href: to("job", row.id), class: "mono", title: row.id }, row.id) },
  kind: { title: "Kind", sort: "kind", cell: (row) => row.kind },
  model: { title: "Model", sort: "model", cell: (row) => clipped(breakable(shortModel(row.model)), "", row.models.join("\n")) },
  rate: { title: "Rate", cell: (row) => (row.learning_rate === null ? "" : h("span", { class: "nowrap", title: valueText(row.learning_rate) }, shortText(row.learning_rate))) },
  curve: { title: "Curve", cell: () => h("span", { class: "faint" }, "·") },
  last: { title: "Last", cell: (row) => clipped(row.last, row.status === "failed" ? "problem" : "") },
  meta: { title: "Tags", cell: (row) => clipped(Object.entries(row.meta).map(([key, value]) => `${key}=${valueText(value)}`).join(" ")) },
  worker: { title: "Worker", cell: (row) => row.worker },
  cloud: { title: "Cloud", cell: (row) => row.cloud || "" },
  attempts: { title: "Attempts", cell: (row) => String(row.attempts) },
  created: { title: "Created", sort: "created", cell: (row) => when(row.created) },
  updated: { title: "Changed", sort: "updated", cell: (row) => when(row.updated) },
};
const USUAL = ["status", "id", "kind", "model", "rate", "curve", "last", "meta", "updated"];
const NARROW = new Set(["status", "id"]);
// What stands below the id in a window that has no room for their columns.
const BELOW = ["kind", "model", "last"];
const ROOMY = new Set(["kind", "rate", "meta", "created", "cloud", "worker", "attempts", "updated"]);
const room = (name) => (NARROW.has(name) ? "" : ROOMY.has(name) ? "optional roomy" : "optional");
const STATUSES = ["pending", "in_progress", "completed", "failed", "canceled"];
const VERBS = { cancel: "Cancel the job", restart: "Restart the job", delete: "Delete the job" };

// What says how a run goes, the first that it measures.
const LEADING = ["reward", "loss"];
export const DELETION = (id) => `Delete ${id}, with its runs, events and logs? Nothing brings them back.`;
const PAGE = 100;

export async function show(view, { query, signal }) {
  const state = { text: "", samples: "", status: "", kind: "", model: "", tag: "", sort: "updated", order: "desc", offset: 0, ...query };
  const chosen = new Set();
  let columns = (JSON.parse(localStorage.getItem("columns") || "null") || USUAL).filter((name) => name in COLUMNS);
  let models = [];

  const search = h("input", { type: "search", value: state.text, placeholder: "Search (/)", "aria-label": "Search jobs", size: 28 });
  const kinds = h("select", { "aria-label": "Kind" });
  const modelChoice = h("select", { "aria-label": "Model" });
  const tag = h("input", { value: state.tag, placeholder: "tag or tag=value", "aria-label": "Tag", size: 14 });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Status" });
  const compare = h("button", { type: "button", class: "main", "data-key": "c", disabled: true, onclick: () => { location.hash = to("compare", "", { jobs: [...chosen].join(",") }); } }, "Compare (c)");
  const head = h("tr");
  const body = h("tbody");
  const below = h("div", { class: "bar" });

  search.addEventListener("input", afterTyping(() => change({ text: search.value })));
  tag.addEventListener("input", afterTyping(() => change({ tag: tag.value })));
  kinds.addEventListener("change", () => change({ kind: kinds.value }));
  modelChoice.addEventListener("change", () => change({ model: modelChoice.value }));

  view.append(
    h("h1", {}, "Jobs"),
    h("div", { class: "bar" }, search, kinds, modelChoice, tag, compare, columnChoice()),
    chips,
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), body)), below);

  function change(what) {
    Object.assign(state, { offset: 0 }, what);
    remember(Object.fromEntries(Object.entries(state).filter(([key, value]) => value && !(key === "sort" && value === "updated") && !(key === "order" && value === "desc")).concat(Object.keys(state).filter((key) => !state[key]).map((key) => [key, ""]))));
    load().catch(told);
  }

  function columnChoice() {
    const boxes = Object.entries(COLUMNS).filter(([name]) => name !== "id").map(([name, { title }]) => h("label", {},
      h("input", { type: "checkbox", checked: columns.includes(name), onchange: (event) => {
        columns = Object.keys(COLUMNS).filter((other) => (other === name ? event.target.checked : columns.includes(other)));
        localStorage.setItem("columns", JSON.stringify(columns));
        load().catch(told);
      } }), title));
    return h("details", { class: "spread" }, h("summary", {}, "Columns"), h("div", { class: "bar" }, boxes));
  }

  function header() {
    fill(head, h("th", { scope: "col", "aria-label": "Chosen" }, "✓"), columns.map((name) => {
      const { title, sort } = COLUMNS[name];
      const turned = state.sort === sort ? (state.order === "desc" ? " ↓" : " ↑") : "";
      return h("th", { scope: "col", class: room(name), "aria-sort": turned ? (state.order === "desc" ? "descending" : "ascending") : null },
        sort ? h("button", { type: "button", onclick: () => change({ sort, order: state.sort === sort && state.order === "desc" ? "asc" : "desc" }) }, title + turned) : title);
    }), h("th", { scope: "col", class: "optional roomy" }, "Do"));
  }

  function cells(row) {
    const box = h("input", { type: "checkbox", "aria-label": `choose ${row.id}`, checked: chosen.has(row.id), onchange: () => {
      if (box.checked) chosen.add(row.id); else chosen.delete(row.id);
      compare.disabled = chosen.size === 0;
    } });
    return [h("td", {}, box), columns.map((name) => h("td", { class: `wrap ${room(name)}`, "data-column": name }, COLUMNS[name].cell(row), name === "id" && folded(row))), h("td", { class: "optional roomy actions" }, actions(row))];
  }

  const folded = (row) => BELOW.filter((name) => columns.includes(name)).map((name) => h("div", { class: `${ROOMY.has(name) ? "folded" : "narrow"} faint` }, COLUMNS[name].cell(row)));

  function actions(row) {
    if (row.status === "pending" || row.status === "in_progress") {
      return h("button", { type: "button", class: "danger", onclick: () => act(row, "cancel", `Cancel ${row.id}?`) }, "Cancel");
    }
    const restart = row.status !== "completed" && h("button", { type: "button", onclick: () => act(row, "restart", `Queue ${row.id} again? It goes on from its last checkpoint.`) }, "Restart");
    return [restart || h("a", { href: to("new", "", { from: row.id }) }, "Again"), " ",
      h("button", { type: "button", class: "danger", onclick: () => act(row, "delete", DELETION(row.id)) }, "Delete")];
  }

  async function act(row, verb, question) {
    if (!await ask(question, VERBS[verb])) return;
    try { await post(`${jobPath(row.id)}/${verb}`); await load(); } catch (error) { notice(error.message, true); }
  }

  /** What went wrong, unless the view was left meanwhile. */
  function told(error) { if (!signal.aborted) notice(error.message, true); }

  async function load() {
    const page = await get("/api/jobs", { ...state, limit: PAGE }, signal);
    if (signal.aborted) return page;
    models = page.models;
    options(kinds, "all kinds", page.kinds, state.kind);
    options(modelChoice, "all models", models, state.model);
    fill(chips, STATUSES.map((name) => h("button", { type: "button", class: `chip ${name}`, "aria-pressed": String(state.status === name), onclick: () => change({ status: state.status === name ? "" : name }) }, `${name.replace("_", " ")} ${page.statuses[name] || 0}`)));
    header();
    fill(body, page.rows.map((row) => h("tr", { "data-row": row.id }, cells(row))));
    if (!page.rows.length) fill(body, h("tr", {}, h("td", { class: "empty", colspan: columns.length + 2 }, emptyText(state))));
    const at = Number(state.offset);
    fill(below, h("span", { class: "faint" }, page.total ? `${at + 1} to ${Math.min(at + PAGE, page.total)} of ${page.total.toLocaleString("en")}` : ""),
      page.samples > 0 && h("label", { class: "spread" }, h("input", { type: "checkbox", checked: state.samples === "1", onchange: (event) => change({ samples: event.target.checked ? "1" : "" }) }), `the ${page.samples} that job.sample has made`),
      at > 0 && h("button", { type: "button", onclick: () => move(at - PAGE) }, "Newer"),
      at + PAGE < page.total && h("button", { type: "button", onclick: () => move(at + PAGE) }, "Older"));
    if (columns.includes("curve")) curves(page.rows);
    return page;
  }

  function move(offset) { change({ offset: Math.max(offset, 0) }); view.scrollIntoView(); }

  async function curves(rows) {
    const trained = rows.filter((row) => row.attempts > 0).map((row) => row.id);
    for (let start = 0; start < trained.length && !signal.aborted; start += 10) {
      const jobs = trained.slice(start, start + 10);
      const found = await get("/api/series", { jobs: jobs.join(","), names: LEADING.join(","), points: 40 }, signal).catch(() => ({}));
      for (const [id, { series }] of Object.entries(found)) {
        const cell = body.querySelector(`tr[data-row="${CSS.escape(id)}"] [data-column=curve]`);
        const leading = LEADING.find((name) => series[name]);
        if (cell && leading) fill(cell, spark(series[leading], leading));
      }
    }
  }

  const { as_of: since } = await load();
  // What most people look at next is a chart.
  requestIdleCallback?.(() => library().catch(() => {}));
  const events = new EventSource(`/api/jobs/stream?since=${encodeURIComponent(since)}`);
  signal.addEventListener("abort", () => events.close());
  events.addEventListener("message", (event) => {
    const changed = JSON.parse(event.data).filter((row) => state.samples || !row.of_sample);
    const known = changed.every((row) => body.querySelector(`tr[data-row="${CSS.escape(row.id)}"]`));
    if (!known) { load().catch(() => {}); return; }
    for (const row of changed) fill(body.querySelector(`tr[data-row="${CSS.escape(row.id)}"]`), cells(row));
    if (columns.includes("curve")) curves(changed);
  });
  events.addEventListener("away", (event) => notice(`the store is away: ${JSON.parse(event.data)}`, true));
  const clock = setInterval(() => { for (const time of body.querySelectorAll("time")) time.textContent = ago(time.dateTime); }, 5000);
  signal.addEventListener("abort", () => clearInterval(clock));
}

/** A text of which a row shows a few lines; all of it stands in its tip. */
const clipped = (text, look = "", whole = text) => h("div", { class: `clip ${look}`, title: whole }, text);

function emptyText(state) {
  return state.text || state.status || state.kind || state.model || state.tag ? "No job fits these filters." : "No jobs yet. “New job” makes one; so does ow.fine_tuning.create(…).";
}

function options(select, all, values, chosen) {
  fill(select, h("option", { value: "" }, all), values.map((value) => h("option", { value, selected: value === chosen }, value)));
}

/** A small line of a series. */
export function spark({ step, value }, name) {
  const points = step.map((x, at) => [x, value[at]]).filter(([, y]) => y !== null);
  if (points.length < 2) return h("span", { class: "faint" }, points.length ? number(points[0][1]) : "·");
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const place = ([x, y]) => `${(108 * (x - left) / (right - left || 1) + 1).toFixed(1)},${(24 - 22 * (y - low) / (high - low || 1)).toFixed(1)}`;
  return svg("svg", { class: "spark", viewBox: "0 0 110 26", role: "img", "aria-label": `${name} from ${number(ys[0])} to ${number(ys.at(-1))}` }, svg("path", { d: `M${points.map(place).join("L")}` }));
}

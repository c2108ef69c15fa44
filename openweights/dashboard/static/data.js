// Stored files: rows as they are read, what is learned in colour, lengths, what would be refused.

import { fill, h, notice, number, size, when } from "./dom.js";
import { file as filePath, get, post } from "./api.js";
import { colour, draw } from "./charts.js";
import { remember, to } from "./route.js";

const PURPOSES = ["conversations", "preference", "multiple_choice"];
const GROUPS = { training: "training data", evaluation: "evaluation", prompts: "prompts", custom: "files of jobs", results: "results" };
const FILES = 100;
const LOSSES = ["sft", "sdft", "grpo", "dpo", "orpo"];
const PAGE = 20;

export async function show(view, { id, query, signal }) {
  if (id) return one(view, id, query, signal);
  const purpose = h("select", { "aria-label": "Purpose" }, PURPOSES.map((name) => h("option", {}, name)));
  const table = h("tbody"), below = h("div", { class: "bar" });
  let shown = query.show in GROUPS ? query.show : "training", offset = 0;
  const chips = h("div", { class: "chips", role: "group", "aria-label": "What the files are for" });
  view.append(h("h1", {}, "Data"), drop(), chips, h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Name", "Read by", "File", "Size", "Stored"].map((title) => h("th", { scope: "col", class: title === "File" ? "optional" : null }, title)))), table)), below);
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
      await list(purpose.value === "multiple_choice" ? "evaluation" : "training");
    } catch (error) { notice(error.message, true); }
  }

  async function list(group = shown, from = 0) {
    [shown, offset] = [group, from];
    remember({ show: shown === "training" ? "" : shown });
    const found = await get("/api/files", { group: shown, offset, limit: FILES + 1 }, signal);
    const again = (...where) => () => list(...where).catch((error) => notice(error.message, true));
    fill(chips, Object.entries(GROUPS).map(([name, title]) => h("button", { type: "button", class: "chip", "aria-pressed": String(name === shown), onclick: again(name) }, title)));
    const row = (file) => h("tr", { "data-row": file.id }, h("td", { class: "wrap" }, h("a", { href: to("data", file.id), title: file.id }, file.filename || file.id)), h("td", { class: "wrap" }, readers(file)), h("td", { class: "mono faint optional wrap" }, file.id), h("td", { class: "number nowrap" }, size(file.bytes)), h("td", {}, when(file.created_at)));
    fill(table, found.length ? found.slice(0, FILES).map(row) : h("tr", {}, h("td", { colspan: 5, class: "empty" }, shown in { training: 1, evaluation: 1 } ? "None of these yet: drop one above." : "None of these yet.")));
    fill(below, offset > 0 && h("button", { type: "button", onclick: again(shown, Math.max(offset - FILES, 0)) }, "Newer"), found.length > FILES && h("button", { type: "button", onclick: again(shown, offset + FILES) }, "Older"));
  }
}

/** What jobs read it as, with the way to them. */
function readers({ id, uses }) {
  const told = Object.entries(uses).map(([use, count]) => `${use} of ${count} job${count > 1 ? "s" : ""}`);
  return told.length ? h("a", { href: to("jobs", "", { text: id, samples: 1 }) }, told.join(", ")) : h("span", { class: "faint" }, "–");
}

async function one(view, id, query, signal) {
  const rows = h("div", { class: "answers" }), facts = h("div"), chart = h("div", { class: "chart", role: "img", "aria-label": "histogram of lengths" });
  const known = await get("/api/jobs", { trained: 1, limit: 200 }, signal);
  const names = h("datalist", { id: "readers" }, [...known.rows.map((row) => h("option", { value: row.id }, row.model)), ...known.models.map((name) => h("option", { value: name }))]);
  const reader = h("input", { value: query.job || query.model || "", list: "readers", size: 36, "aria-label": "Read as", placeholder: "a job, or a model" });
  const loss = h("select", { "aria-label": "Loss" }, ["", ...LOSSES].map((name) => h("option", { value: name, selected: name === query.loss }, name || "usual loss")));
  const isJob = (name) => /^\w+job-/.test(name);
  const reading = () => (reader.value ? { [isJob(reader.value) ? "job" : "model"]: reader.value, ...(isJob(reader.value) ? {} : { loss: loss.value }) } : {});
  let offset = 0;
  const read = (event) => {
    event?.preventDefault();
    loss.disabled = isJob(reader.value);
    remember({ job: "", model: "", loss: "", ...reading() });
    return Promise.all([page(), summary()]).catch((error) => notice(error.message, true));
  };
  const title = h("h1", {}, id);
  view.append(title, h("p", { class: "mono faint" }, id), h("div", { class: "bar" }, h("a", { href: `${filePath(id)}/content`, download: true }, "Download"), h("a", { href: to("new", "", { training_file: id }) }, "Train on it")),
    names, h("form", { class: "bar", onsubmit: read }, h("label", {}, "Read as ", reader), h("label", {}, "with ", loss), h("button", {}, "Render")), facts, chart, rows);
  await read();

  async function summary() {
    const found = await get(`${filePath(id)}/summary`, reading(), signal);
    title.textContent = found.filename || id;
    fill(facts, h("p", {}, `${found.rows.toLocaleString("en")} rows. `, h("span", { class: "key learned" }, "learned"), " ", reader.value && [h("span", { class: "key weighted" }, "weighted"), " ", h("span", { class: "key unlearned" }, "unlearned"), " "], "The rest is read."),
      found.problems.length ? h("details", { open: true }, h("summary", { class: "problem" }, "Rows that would be refused"), h("pre", { class: "problem" }, found.problems.join("\n"))) : null);
    const { edges, counts } = found.lengths;
    await draw(chart, [{ type: "bar", x: counts.map((_, at) => (edges[at] + edges[at + 1]) / 2), y: counts, name: "rows", marker: { color: colour(0) } }], { showlegend: false, bargap: 0.05, xaxis: { title: { text: `${found.unit} of a row` } }, yaxis: { title: { text: "rows" } } });
  }

  async function page() {
    const found = await get(`${filePath(id)}/rows`, { offset, limit: PAGE, ...reading() }, signal);
    const move = (by) => { offset = Math.max(offset + by, 0); page().catch((error) => notice(error.message, true)); };
    fill(rows, h("div", { class: "bar" }, h("button", { type: "button", disabled: offset === 0, onclick: () => move(-PAGE) }, "Earlier"), h("button", { type: "button", disabled: !found.more, onclick: () => move(PAGE) }, "Later"), h("span", { class: "faint" }, `from row ${offset + 1}`)),
      found.rows.map((row) => h("section", { class: "panel" }, h("h2", {}, `line ${row.line}`), row.problem && h("p", { class: "problem" }, row.problem), (row.texts || []).map(rendered),
        (row.parts || []).map((part) => h("div", { class: part.learned ? "part learned" : "part" }, h("span", { class: "role" }, part.role), part.text)),
        Object.keys(row.other || {}).length > 0 && h("pre", {}, JSON.stringify(row.other, null, 1)))));
  }
}

function rendered({ title, stretches }) {
  return h("div", { class: "part" }, title && h("span", { class: "role" }, title), stretches.map(([text, weight]) => (weight === null ? text
    : h("span", { class: weight === 1 ? "learned" : weight < 0 ? "unlearned" : "weighted", title: `weight ${number(weight)}` }, text))));
}

// One job: what it was asked, how it goes, what it said.

import { ask, breakable, copy, duration, fill, h, notice, number, pause, size, status, valueText, when } from "./dom.js";
import { file as filePath, get, job as jobPath, post } from "./api.js";
import { draw, library, look, stepAxis } from "./charts.js";
import { DELETION } from "./jobs.js";
import { logView } from "./log.js";
import { answersView } from "./samples.js";
import { sheetsView } from "./sheets.js";
import { to } from "./route.js";

// What the gate is read by; all else explains it.
const GATE = ["passed", "measure", "student", "teacher", "same_format"];
const FIGURES = { same_format: "begins and ends as teacher's" };
const NOTHING_SAID = "No answers were logged. SDFT and GRPO log some by themselves, sampling_callbacks those to your own prompts; what a job of another kind has written is among its result files.";
const FIGURE_COLUMNS = new Set(["Score", "To the first model", "Problems"]);
const TRAINED = ["fine_tuning", "weighted_sft"];

export async function show(view, { id, query, signal }) {
  library();
  let job = await get(jobPath(id), {}, signal);
  const head = h("div"), facts = h("div"), charts = h("div", { class: "panels" }), waiting = h("p", { class: "faint" });
  const more = h("details", { hidden: true, ontoggle: () => paint().catch((error) => notice(error.message, true)) }, h("summary", {}), h("div", { class: "panels" }), h("dl", { class: "facts" }));
  const params = h("div"), files = h("div"), answers = h("div"), log = h("div");
  const scores = h("div");
  const heading = h("h2", {}, "Charts"), curves = [heading, waiting, charts, more], said_ = [h("h2", {}, "What it said"), answers];
  // What a job is for comes first: of a training its curves, of an evaluation or an inference the answers.
  const [first, then] = TRAINED.includes(job.made_by) ? [curves, [h("h2", {}, "Log"), log, ...said_]] : [said_, [...curves, h("h2", {}, "Log"), log]];
  view.append(head, facts, scores, ...first, ...then,
    h("div", { class: "two" }, h("section", {}, h("h2", {}, "Parameters"), params), h("section", {}, h("h2", {}, "Result files"), files, h("h2", {}, "Make it again"), again(job))));
  const drawn = new Map();
  let measured = { series: {}, layout: { panels: [], more: [], still: [] } };
  render();
  await Promise.all([measure(), logs(), said(), results(), evaluated()].map((part) => part.catch((error) => { if (!signal.aborted) notice(error.message, true); })));

  function render() {
    fill(head, h("h1", {}, job.id, " ", status(job.status, job.status_word)), h("div", { class: "bar" }, buttons(),
      h("a", { href: to("compare", "", { jobs: job.id }) }, "Compare"), h("a", { href: to("samples", "", { jobs: job.id }) }, "Samples"), h("a", { href: to("new", "", { from: job.id }) }, "Start from this one"), job.status === "completed" && TRAINED.includes(job.made_by) && h("a", { href: to("chat", "", { a: job.id }) }, "Chat")));
    const last = job.runs.at(-1);
    const shown = {
      [job.status === "pending" ? "Waits" : "Progress"]: job.progress.words && [job.progress.total && h("progress", { value: Math.min(job.progress.step, job.progress.total), max: job.progress.total, "aria-label": "steps" }), " ", job.progress.words],
      Kind: job.kind, [job.models.length > 1 ? "Models" : "Model"]: job.models.length > 0 && job.models.map((name) => h("div", {}, name)), Created: when(job.created), Changed: when(job.updated),
      After: job.after.length ? job.after.map((other) => [h("a", { class: "mono", href: to("job", other) }, other), " "]) : null, Took: last ? duration(((last.ended ? new Date(last.ended) : new Date()) - new Date(last.started)) / 1000) : null,
      Hardware: job.hardware.join(", ") || (job.vram_gb ? `${job.vram_gb} GB of GPU memory asked for` : null),
      Worker: job.worker, "Cloud type": job.cloud, Cost: job.usd === null ? null : `$${job.usd.toFixed(2)}`, Command: h("code", {}, job.script),
      Error: job.error && h("div", { class: "problem tall" }, job.error),
    };
    fill(facts, h("dl", { class: "facts" }, Object.entries(shown).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      job.runs.length > 1 && runTable());
    const usual = job.params.filter(({ differs }) => !differs);
    fill(params, paramTable(job.params.filter(({ differs }) => differs)), usual.length > 0 && h("details", {}, h("summary", {}, `${usual.length} at their defaults`), paramTable(usual)));
  }

  async function results() {
    const found = await get(`${jobPath(id)}/files`, {}, signal);
    found.sort((a, b) => a.path.localeCompare(b.path, "en", { numeric: true }));
    fill(files, found.length ? h("ul", {}, found.map(({ path, file }) => h("li", {}, h("a", { href: `${filePath(file)}/content`, download: true }, path)))) : h("p", { class: "faint" }, "none"));
  }

  async function evaluated() {
    const found = await get("/api/scores", { jobs: id }, signal);
    const others = found.some(({ evaluation }) => evaluation !== id);
    const interval = (low, high) => `${number(low)} to ${number(high)}`;
    fill(scores, found.length > 0 && [h("h2", {}, "Scores"), h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Task", "Model", "Score", "95 %", "To the first model", "95 %", "Problems", others && "Evaluation"].filter(Boolean).map((title) => h("th", { scope: "col", class: FIGURE_COLUMNS.has(title) ? "number" : null }, title)))),
      h("tbody", {}, found.map((one) => h("tr", {}, h("td", { class: "wrap" }, breakable(one.task)), h("td", { class: "wrap" }, breakable(one.model)), h("td", { class: "number" }, number(one.score)), h("td", {}, interval(one.low, one.high)),
        h("td", { class: "number" }, one.difference ? `${one.difference[0] > 0 ? "+" : ""}${number(one.difference[0])}` : "–"), h("td", {}, one.difference ? interval(one.difference[1], one.difference[2]) : ""),
        h("td", { class: "number" }, String(one.problems)), others && h("td", {}, one.evaluation === id ? "this one" : h("a", { class: "mono", href: to("job", one.evaluation) }, one.evaluation)))))))]);
  }

  function paramTable(rows) {
    return h("div", { class: "scroll" }, h("table", { class: "params" }, h("thead", {}, h("tr", {}, ["Name", "Value", "Default"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows.map((row) => h("tr", { class: row.differs ? "differs" : "faint" }, h("td", {}, row.name), h("td", { class: "wrap" }, valueText(row.shown)), h("td", { class: "wrap faint" }, row.differs ? valueText(row.default) : ""))))));
  }

  function isOpen() { return job.status === "pending" || job.status === "in_progress"; }

  function buttons() {
    const act = async (verb, question, action) => {
      if (!await ask(question, action)) return;
      try { await post(`${jobPath(id)}/${verb}`); await refresh(); } catch (error) { notice(error.message, true); }
    };
    if (isOpen()) return h("button", { type: "button", class: "danger", onclick: () => act("cancel", `Cancel ${id}?`, "Cancel the job") }, "Cancel");
    const remove = h("button", { type: "button", class: "danger", onclick: async () => {
      if (!await ask(DELETION(id), "Delete the job")) return;
      try { await post(`${jobPath(id)}/delete`); location.hash = "#/jobs"; } catch (error) { notice(error.message, true); }
    } }, "Delete");
    return [job.status !== "completed" && h("button", { type: "button", onclick: () => act("restart", `Queue ${id} again? It goes on from its last checkpoint.`, "Restart the job") }, "Restart"), remove];
  }

  function runTable() {
    return h("details", {}, h("summary", {}, `${job.runs.length} runs`), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Run", "Status", "Started", "Log", "Error"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, job.runs.map((run) => h("tr", {}, h("td", {}, String(run.id)), h("td", {}, status(run.is_given_back ? "given_back" : run.status)), h("td", {}, when(run.started)), h("td", {}, size(run.log_bytes)), h("td", { class: "wrap" }, run.error || "")))))));
  }

  async function refresh() {
    const before = job.status;
    job = await get(jobPath(id), {}, signal);
    render();
    if (job.status !== before) await Promise.all([said(), results(), evaluated()]);
  }

  async function measure() {
    let known = "";
    while (!signal.aborted) {
      const found = (await get("/api/series", { jobs: id, points: 200, known }, signal))[id];
      if (!found.unchanged) {
        known = found.version;
        measured = found;
        await paint();
        const some = Object.keys(found.series).length > 0;
        waiting.textContent = found.complete ? (some ? "" : isOpen() ? "Nothing was measured yet." : "Nothing was measured.") : "Reading a long history…";
      } else if (found.complete && waiting.textContent.startsWith("Reading")) waiting.textContent = "";
      if (!found.complete) continue;
      if (!isOpen()) return;
      await pause(2000);
      if (!document.hidden) await refresh();
    }
  }

  /** Charts in the order that the server gives, which may grow at any place while a job runs. */
  async function paint() {
    const { panels, more: rest, still } = measured.layout;
    const values = [...still].map(([title, lines]) => [title, lines.map(([label, name]) => [label === "train" ? "" : `${label} `, number(measured.series[name].value.at(-1))])]);
    heading.textContent = panels.length || isOpen() ? "Charts" : "Measures";
    more.hidden = !rest.length && !values.length;
    more.open ||= !panels.length && !rest.length && values.length > 0;
    more.querySelector("summary").textContent = `${panels.length ? "More: " : ""}${[rest.length && `${rest.length} timings and counts`, values.length && `${values.length} measured once, or always the same`].filter(Boolean).join(", ")}`;
    fill(more.querySelector("dl"), values.map(([title, parts]) => [h("dt", {}, title), h("dd", {}, parts.map(([label, value]) => `${label}${value}`).join(" · "))]));
    // One range of steps for all of them, so that charts can be compared.
    const steps = stepAxis("step", (panels.length ? panels : rest).flatMap(([, lines]) => lines.map(([, name]) => ({ x: measured.series[name].step }))));
    await charted(charts, panels, steps);
    // What is hidden has no size that a chart could have.
    if (more.open) await charted(more.querySelector(".panels"), rest, steps);
  }

  async function charted(place, panels, xaxis) {
    const sections = panels.map(([title]) => {
      if (!drawn.has(title)) drawn.set(title, h("section", { class: "panel" }, h("h3", { title }, title || "(no name)"), h("div", { class: "chart", role: "img", "aria-label": `chart of ${title}` })));
      return drawn.get(title);
    });
    if (sections.some((section, at) => place.children[at] !== section) || place.children.length !== sections.length) fill(place, sections);
    for (const [at, [, lines]] of panels.entries()) {
      const traces = lines.map(([label, name], place_) => ({ x: measured.series[name].step, y: measured.series[name].value, name: label, mode: measured.series[name].step.length < 40 ? "lines+markers" : "lines", line: { ...look(place_), width: 2 }, marker: { size: measured.series[name].step.length > 1 ? 4 : 8 } }));
      await draw(sections[at].querySelector(".chart"), traces, { showlegend: lines.length > 1 || lines[0][0] !== "train", xaxis });
    }
  }

  async function logs() {
    const run = job.runs.at(-1);
    if (!run) { fill(log, h("p", { class: "faint" }, "It has not run yet.")); return; }
    fill(log, logView(job.runs, run.id, signal));
  }

  async function said() {
    const gate = h("div"), sheets = h("div"), place = h("div");
    fill(answers, gate, sheets, place);
    const found = await Promise.all([gateView(gate, id, signal), sheetsView(sheets, id, signal), answersView(place, id, signal)]);
    if (!found.some(Boolean)) fill(place, h("p", { class: "faint" }, isOpen() ? "Nothing yet." : NOTHING_SAID));
  }
}

/** What the demonstrations do for the teacher, each time it was looked at. */
async function gateView(place, id, signal) {
  const gates = await get(`${jobPath(id)}/gates`, {}, signal);
  if (!gates.length) return false;
  const body = h("div"), label = h("output");
  const slide = h("input", { type: "range", min: 0, max: gates.length - 1, value: gates.length - 1, "aria-label": "Look at the teacher", oninput: () => render() });
  function render() {
    const { examples: given, type, step, ...rest } = gates[Number(slide.value)];
    const examples = (Array.isArray(given) ? given : []).filter((one) => one !== null && typeof one === "object");
    label.textContent = `step ${step ?? 0}`;
    slide.setAttribute("aria-valuetext", label.textContent);
    const figures = [...GATE.filter((key) => key in rest), ...Object.keys(rest).filter((key) => !GATE.includes(key))].map((key) => [key, rest[key]]).filter(([, value]) => typeof value !== "object");
    fill(body, h("dl", { class: "facts" }, figures.map(([key, value]) => [h("dt", {}, FIGURES[key] ?? key.replaceAll("_", " ")), h("dd", {}, number(value))])),
      examples.length > 0 && h("details", {}, h("summary", {}, `${examples.length} examples`), examples.map((example) => h("div", { class: "answer" }, Object.entries(example).map(([key, value]) => h("div", { class: "part" }, h("span", { class: "role" }, key.replaceAll("_", " ")), valueText(value)))))));
  }
  render();
  fill(place, h("section", { class: "panel" }, h("h3", {}, "What the demonstrations do for the teacher"), gates.length > 1 && h("div", { class: "bar" }, slide, label), body));
  return true;
}

function again(job) {
  const copies = [["Copy", job.python], ["Copy as a command", job.command]];
  return [h("div", { class: "bar" }, copies.map(([title, text]) => h("button", { type: "button", onclick: () => copy(text) }, title))), h("pre", {}, job.python)];
}

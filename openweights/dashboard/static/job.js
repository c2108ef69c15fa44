// One job: what it was asked, how it goes, what it said.

import { ask, copy, duration, fill, h, notice, number, pause, size, status, valueText, when } from "./dom.js";
import { file as filePath, get, job as jobPath, post } from "./api.js";
import { colour, draw, library } from "./charts.js";
import { DELETION } from "./jobs.js";
import { logView } from "./log.js";
import { answersView } from "./samples.js";
import { to } from "./route.js";

// Panels that matter first; what is left follows by name. Timings and constants come last.
const FIRST = [/^loss$/, /reward/, /divergence|kl/, /accuracy/, /agreement|entropy/, /completion|eos|truncated/];
const LAST = [/_s$|per_s$|per_second|runtime/, /learning_rate|epoch|grad_norm/];

export async function show(view, { id, query, signal }) {
  library();
  let job = await get(jobPath(id), {}, signal);
  const head = h("div"), facts = h("div"), charts = h("div", { class: "panels" }), waiting = h("p", { class: "faint" }), constants = h("p", { class: "faint" });
  const params = h("div"), files = h("div"), answers = h("div"), log = h("div");
  const scores = h("div");
  view.append(head, facts, scores, h("h2", {}, "Charts"), waiting, charts, constants, h("h2", {}, "Log"), log, h("h2", {}, "What it said"), answers,
    h("div", { class: "two" }, h("section", {}, h("h2", {}, "Parameters"), params), h("section", {}, h("h2", {}, "Result files"), files, h("h2", {}, "Make it again"), again(job))));
  render();
  const drawn = new Map();
  await Promise.all([measure(), logs(), said(), results(), evaluated()].map((part) => part.catch((error) => { if (!signal.aborted) notice(error.message, true); })));

  function render() {
    fill(head, h("h1", {}, job.id, " ", status(job.status)), h("div", { class: "bar" }, buttons(),
      h("a", { href: to("compare", "", { jobs: job.id }) }, "Compare"), h("a", { href: to("samples", "", { jobs: job.id }) }, "Samples"), h("a", { href: to("new", "", { from: job.id }) }, "Start from this one"), job.status === "completed" && h("a", { href: to("chat", "", { a: job.id }) }, "Chat")));
    const last = job.runs.at(-1);
    const shown = {
      Kind: job.kind, Model: job.model, Created: when(job.created), Changed: when(job.updated),
      After: job.after.length ? job.after.map((other) => [h("a", { class: "mono", href: to("job", other) }, other), " "]) : null, Took: last ? duration(((last.ended ? new Date(last.ended) : new Date()) - new Date(last.started)) / 1000) : null,
      Hardware: job.hardware.join(", ") || (job.vram_gb ? `${job.vram_gb} GB of GPU memory asked for` : null),
      Worker: job.worker, "Cloud type": job.cloud, Cost: job.usd === null ? null : `$${job.usd.toFixed(2)}`, Command: h("code", {}, job.script),
      Error: job.error && h("span", { class: "problem" }, job.error),
    };
    fill(facts, h("dl", { class: "facts" }, Object.entries(shown).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      job.runs.length > 1 && runTable());
    const usual = job.params.filter(({ differs }) => !differs);
    fill(params, paramTable(job.params.filter(({ differs }) => differs)), usual.length > 0 && h("details", {}, h("summary", {}, `${usual.length} at their defaults`), paramTable(usual)));
  }

  async function results() {
    const found = await get(`${jobPath(id)}/files`, {}, signal);
    fill(files, found.length ? h("ul", {}, found.map(({ path, file }) => h("li", {}, h("a", { href: `${filePath(file)}/content`, download: true }, path)))) : h("p", { class: "faint" }, "none"));
  }

  async function evaluated() {
    const found = await get("/api/scores", { jobs: id }, signal);
    const interval = (low, high) => `${number(low)} to ${number(high)}`;
    fill(scores, found.length > 0 && [h("h2", {}, "Scores"), h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Task", "Model", "Score", "95 %", "To the first model", "95 %", "Problems", "Evaluation"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, found.map((one) => h("tr", {}, h("td", {}, one.task), h("td", { class: "wrap" }, one.model), h("td", { class: "number" }, number(one.score)), h("td", {}, interval(one.low, one.high)),
        h("td", { class: "number" }, one.difference ? `${one.difference[0] > 0 ? "+" : ""}${number(one.difference[0])}` : "–"), h("td", {}, one.difference ? interval(one.difference[1], one.difference[2]) : ""),
        h("td", { class: "number" }, String(one.problems)), h("td", {}, one.evaluation === id ? "this one" : h("a", { class: "mono", href: to("job", one.evaluation) }, one.evaluation)))))))]);
  }

  function paramTable(rows) {
    return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Name", "Value", "Default"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, rows.map((row) => h("tr", { class: row.differs ? "differs" : "faint" }, h("td", {}, row.name), h("td", { class: "wrap" }, valueText(row.value)), h("td", { class: "wrap faint" }, row.differs ? valueText(row.default) : ""))))));
  }

  function buttons() {
    const running = job.status === "pending" || job.status === "in_progress";
    const act = async (verb, question, action) => {
      if (!await ask(question, action)) return;
      try { await post(`${jobPath(id)}/${verb}`); await refresh(); } catch (error) { notice(error.message, true); }
    };
    if (running) return h("button", { type: "button", class: "danger", onclick: () => act("cancel", `Cancel ${id}?`, "Cancel the job") }, "Cancel");
    const remove = h("button", { type: "button", class: "danger", onclick: async () => {
      if (!await ask(DELETION(id), "Delete the job")) return;
      try { await post(`${jobPath(id)}/delete`); location.hash = "#/jobs"; } catch (error) { notice(error.message, true); }
    } }, "Delete");
    return [job.status !== "completed" && h("button", { type: "button", onclick: () => act("restart", `Queue ${id} again? It goes on from its last checkpoint.`, "Restart the job") }, "Restart"), remove];
  }

  function runTable() {
    return h("details", {}, h("summary", {}, `${job.runs.length} runs`), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Run", "Status", "Started", "Log", "Error"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, job.runs.map((run) => h("tr", {}, h("td", {}, String(run.id)), h("td", {}, status(run.status)), h("td", {}, when(run.started)), h("td", {}, size(run.log_bytes)), h("td", { class: "wrap" }, run.error || "")))))));
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
        await paint(found.series);
        const some = Object.keys(found.series).length > 0;
        waiting.textContent = found.complete ? (some ? "" : "Nothing was measured yet.") : "Reading a long history…";
      } else if (found.complete && waiting.textContent.startsWith("Reading")) waiting.textContent = "";
      if (!found.complete) continue;
      if (job.status !== "in_progress" && job.status !== "pending") return;
      await pause(2000);
      if (!document.hidden) await refresh();
    }
  }

  async function paint(series) {
    const varies = (name) => series[name].value.some((value) => value !== series[name].value[0]) || series[name].value.length < 2;
    const fixed = Object.keys(series).filter((name) => !varies(name));
    constants.textContent = fixed.length ? `Constant: ${fixed.map((name) => `${name} ${number(series[name].value[0])}`).join(" · ")}` : "";
    for (const [title, names] of panels(Object.keys(series).filter(varies))) {
      if (!drawn.has(title)) {
        const chart = h("div", { class: "chart", role: "img", "aria-label": `chart of ${title}` });
        charts.append(h("section", { class: "panel" }, h("h3", {}, title), chart));
        drawn.set(title, chart);
      }
      const traces = names.map((name, at) => ({ x: series[name].step, y: series[name].value, name, mode: series[name].step.length < 40 ? "lines+markers" : "lines", line: { color: colour(at), width: 2 }, marker: { size: 4 } }));
      await draw(drawn.get(title), traces, { showlegend: names.length > 1, xaxis: { title: { text: "step" }, tickformat: ",d" } });
    }
  }

  async function logs() {
    const run = job.runs.at(-1);
    if (!run) { fill(log, h("p", { class: "faint" }, "It has not run yet.")); return; }
    fill(log, logView(job.runs, run.id, signal));
  }

  async function said() {
    const gate = h("div"), place = h("div");
    fill(answers, gate, place);
    await Promise.all([gateView(gate, id, signal), answersView(place, id, signal)]);
  }
}

/** Names of measures by panel: train and eval of one measure, and all sets of one, stand together. */
export function panels(names) {
  const groups = new Map();
  for (const name of names) {
    const title = name.replace(/^eval_/, "").replace(/\[.*\]$/, "");
    groups.set(title, [...(groups.get(title) || []), name]);
  }
  const rank = (title) => {
    const first = FIRST.findIndex((pattern) => pattern.test(title));
    const last = LAST.findIndex((pattern) => pattern.test(title));
    return last >= 0 ? 100 + last : first >= 0 ? first : 50;
  };
  return [...groups].sort(([a], [b]) => rank(a) - rank(b) || a.localeCompare(b));
}

/** What the demonstrations do for the teacher, each time it was looked at. */
async function gateView(place, id, signal) {
  const gates = await get(`${jobPath(id)}/gates`, {}, signal);
  if (!gates.length) return;
  const body = h("div"), label = h("output");
  const slide = h("input", { type: "range", min: 0, max: gates.length - 1, value: gates.length - 1, "aria-label": "Look at the teacher", oninput: () => render() });
  function render() {
    const { examples = [], type, step, ...rest } = gates[Number(slide.value)];
    label.textContent = `step ${step ?? 0}`;
    const figures = Object.entries(rest).filter(([, value]) => typeof value !== "object");
    fill(body, h("dl", { class: "facts" }, figures.map(([key, value]) => [h("dt", {}, key.replaceAll("_", " ")), h("dd", {}, number(value))])),
      examples.length > 0 && h("details", {}, h("summary", {}, `${examples.length} examples`), examples.map((example) => h("div", { class: "answer" }, Object.entries(example).map(([key, value]) => h("div", { class: "part" }, h("span", { class: "role" }, key.replaceAll("_", " ")), valueText(value)))))));
  }
  render();
  fill(place, h("section", { class: "panel" }, h("h3", {}, "What the demonstrations do for the teacher"), gates.length > 1 && h("div", { class: "bar" }, slide, label), body));
}

function again(job) {
  return [["Python", job.python], ["Command", job.command]].map(([title, text]) => h("div", {},
    h("div", { class: "bar" }, h("strong", {}, title), h("button", { type: "button", class: "spread", onclick: () => copy(text) }, "Copy")), h("pre", {}, text)));
}

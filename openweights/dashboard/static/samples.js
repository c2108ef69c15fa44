// What models answered: prompts down, jobs or steps across; and tokens coloured by log-probability.

import { fill, h, notice, number } from "./dom.js";
import { get, job as jobPath } from "./api.js";
import { remember } from "./route.js";

const SHOWN = 40;

export async function show(view, { query, signal }) {
  const jobs = (query.jobs || "").split(",").filter(Boolean);
  const ids = h("input", { value: jobs.join(","), size: 50, "aria-label": "Job ids", placeholder: "job ids, with commas between" });
  const open = (event) => { event.preventDefault(); location.hash = `#/samples?jobs=${encodeURIComponent(ids.value.replaceAll(" ", ""))}`; };
  const body = h("div"), tokens = h("div");
  view.append(h("h1", {}, "Samples"), h("form", { class: "bar", onsubmit: open }, h("label", {}, "Jobs ", ids), h("button", { class: "main" }, "Show")), body, tokens);
  if (!jobs.length) { fill(body, h("p", { class: "empty" }, "Name jobs, or choose “Samples” on a job's page.")); return; }
  const steps = await Promise.all(jobs.map((id) => get(`${jobPath(id)}/answers`, {}, signal)));
  const columns = jobs.flatMap((job, at) => steps[at].map((one) => ({ ...one, job })));
  if (!columns.length) fill(body, h("p", { class: "empty" }, "These jobs have logged no answers. SDFT and GRPO log some by themselves; sampling_callbacks adds your own prompts."));
  else await table(body, columns, query, signal);
  for (const id of jobs) await tokenView(tokens, id, signal);
}

/** The rows of a column, asked for once. */
async function rowsOf(column, signal) {
  column.rows ??= await get(`${jobPath(column.job)}/answers/${column.event}`, {}, signal);
  return column.rows;
}

async function table(place, columns, query, signal) {
  const sources = [...new Set(columns.map(({ source }) => source))];
  const source = h("select", { "aria-label": "Prompts" }, sources.map((name) => h("option", { value: name, selected: name === query.source }, name)));
  const grid = h("div");
  const boxes = h("div", { class: "chips", role: "group", "aria-label": "Columns" });
  const several = new Set(columns.map(({ job }) => job)).size > 1;
  const label = ({ job, step }) => `${job} · step ${step}`;
  const words = (column) => (several ? label(column) : `step ${column.step}`);
  const step = h("select", { "aria-label": "Step", onchange: () => stepChosen().catch((error) => notice(error.message, true)) });
  let own = [], chosen = new Set();

  async function sourceChanged(wanted = new Set()) {
    own = columns.filter((column) => column.source === source.value);
    chosen = new Set(own.filter((column) => wanted.has(label(column))));
    if (!chosen.size) chosen = new Set(own.filter((column, at) => column.step === own[0].step || own[at + 1]?.job !== column.job));
    await render();
  }

  async function stepChosen() {
    if (step.value) chosen = new Set(step.value === "all" ? own : own.filter((column) => String(column.step) === step.value));
    await render();
  }

  async function render() {
    const shown = own.filter((column) => chosen.has(column));
    const steps = [...new Set(own.map((column) => column.step))].sort((a, b) => a - b);
    const only = new Set([...chosen].map((column) => column.step));
    const current = chosen.size === own.length ? "all" : only.size === 1 ? String([...only][0]) : "";
    fill(step, [["", "those below"], ["all", `all ${steps.length}`], ...steps.map((one) => [String(one), `step ${one}`])].map(([value, title]) => h("option", { value, selected: value === current }, title)));
    step.parentElement.hidden = steps.length < 2;
    fill(boxes, own.length > 1 && own.map((column) => h("button", { type: "button", class: "chip", "aria-pressed": String(chosen.has(column)), onclick: () => {
      if (chosen.has(column)) chosen.delete(column); else chosen.add(column);
      render().catch((error) => notice(error.message, true));
    } }, words(column))));
    remember({ source: source.value, columns: shown.map(label).join("|") });
    await Promise.all(shown.map((column) => rowsOf(column, signal)));
    const asked = new Map(shown.flatMap(({ rows }) => rows.map((row) => [row.prompt, row.messages])));
    fill(grid, [...asked].slice(0, SHOWN).map(([prompt, messages]) => {
      // Each step of a training has prompts of its own: only those columns stand there that have an answer.
      const answered = shown.filter(({ rows }) => rows.some((one) => one.prompt === prompt));
      const across = `grid-template-columns:repeat(${Math.min(answered.length, innerWidth < 700 ? 1 : 4)},minmax(0,1fr))`;
      return h("section", { class: "panel" }, conversation(messages), h("div", { class: "sides", style: across }, sides(prompt, answered)));
    }));
  }

  function sides(prompt, shown) {
    let first = null;
    return shown.map((column) => {
      const row = column.rows.find((one) => one.prompt === prompt);
      const said = first === null ? [row.completion] : differences(first, row.completion);
      first ??= row.completion;
      return h("div", { class: "answer" }, h("div", { class: "faint" }, words(column), row.ended === false ? " · cut off" : ""), said, rewards(row));
    });
  }

  source.addEventListener("change", () => sourceChanged().catch((error) => notice(error.message, true)));
  place.append(h("div", { class: "bar" }, h("label", {}, "Prompts ", source), h("label", {}, "Steps ", step)), boxes, grid);
  await sourceChanged(new Set((query.columns || "").split("|").filter(Boolean)));
}

/** Words of `to` that `from` lacks are marked, and those of `from` that are gone. */
export function differences(from, to) {
  const a = from.match(/\s+|[^\s]+/g) || [], b = to.match(/\s+|[^\s]+/g) || [];
  if (a.length * b.length > 400000) return [to];
  // Longest common subsequence, from the ends.
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) for (let j = b.length - 1; j >= 0; j -= 1) longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const pieces = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { pieces.push(b[j]); i += 1; j += 1; }
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) { pieces.push(h("del", {}, a[i])); i += 1; }
    else { pieces.push(h("ins", {}, b[j])); j += 1; }
  }
  return pieces;
}

/** What was asked, message by message. */
function conversation(messages) {
  return messages.map(({ role, text }) => h("div", { class: "part" }, h("span", { class: "role" }, role), text));
}

function rewards(row) {
  if (!row.rewards) return null;
  return h("div", { class: "rewards" }, Object.entries(row.rewards).map(([name, value]) => h("span", { class: "chip" }, `${name} ${number(value)}`)));
}

/** The answers of one job, step by step; says whether there are any. */
export async function answersView(place, id, signal) {
  const steps = await get(`${jobPath(id)}/answers`, {}, signal);
  if (!steps.length) return false;
  const columns = steps.map((one) => ({ ...one, job: id }));
  const answers = h("div", { class: "answers" }), label = h("output");
  const again = () => render().catch((error) => notice(error.message, true));
  const sources = [...new Set(columns.map(({ source }) => source))];
  const source = h("select", { "aria-label": "Prompts", onchange: () => { bound(); again(); } }, sources.map((name) => h("option", { value: name }, name)));
  const slide = h("input", { type: "range", min: 0, "aria-label": "Step", oninput: again });
  const own = () => columns.filter((one) => one.source === source.value);
  function bound() { slide.max = own().length - 1; slide.value = slide.max; slide.hidden = own().length < 2; }
  async function render() {
    const column = own()[Number(slide.value)];
    label.textContent = `step ${column.step}`;
    slide.setAttribute("aria-valuetext", label.textContent);
    const rows = await rowsOf(column, signal);
    if (column !== own()[Number(slide.value)]) return;
    fill(answers, rows.slice(0, SHOWN).map((row) => h("div", { class: "answer" }, conversation(row.messages),
      h("div", { class: "part learned" }, h("span", { class: "role" }, row.ended === false ? "completion, cut off" : "completion"), row.completion),
      row.reference && h("div", { class: "part" }, h("span", { class: "role" }, "reference"), row.reference), rewards(row))));
  }
  fill(place, h("div", { class: "bar" }, h("label", {}, "Prompts ", source), slide, label), answers);
  bound();
  await render();
  return true;
}

async function tokenView(place, id, signal) {
  const steps = await get(`${jobPath(id)}/tokens`, {}, signal);
  for (const tag of new Set(steps.map((one) => one.tag))) {
    const own = steps.filter((one) => one.tag === tag);
    const rows = h("div", { class: "answers" }), label = h("output");
    const slide = h("input", { type: "range", min: 0, max: own.length - 1, value: own.length - 1, "aria-label": `step of ${tag}`, oninput: () => load().catch((error) => notice(error.message, true)) });
    const load = async () => {
      const chosen = own[Number(slide.value)];
      label.textContent = `step ${chosen.step}`;
      slide.setAttribute("aria-valuetext", label.textContent);
      const found = await get(`${jobPath(id)}/tokens/${chosen.event}`, {}, signal);
      fill(rows, found.slice(0, SHOWN).map((pieces) => h("div", { class: "answer" }, pieces.map(piece))));
    };
    place.append(h("h2", {}, `Log-probabilities of ${tag}, ${id}`), h("div", { class: "bar" }, slide, label, scale()), rows);
    await load();
  }
}

function piece(one) {
  if (!one.block) return token(one);
  const { tag, weight } = one.block;
  const said = [tag, weight === undefined ? null : `weight ${weight}`].filter(Boolean).join(", ");
  return said ? h("span", { class: "blockmark" }, said) : null;
}

const shade = (logprob) => (0.75 * Math.min(-logprob / 7, 1)).toFixed(2);

/** A token, redder the less likely it was; -7 (0.1 %) and below is the reddest. */
function token({ text, logprob, answer }) {
  const shown = text.replaceAll("Ġ", " ").replaceAll("Ċ", "\n").replaceAll("▁", " ");
  if (logprob === null) return h("span", { class: "faint" }, shown);
  return h("span", { class: answer ? "token" : "token read", title: `${logprob.toFixed(3)} (${(100 * Math.exp(logprob)).toPrecision(3)} %)`, style: `background:rgba(214,60,50,${shade(logprob)})` }, shown);
}

function scale() {
  return h("span", { class: "faint" }, [1, 0.1, 0.01, 0.001].map((share) => h("span", { class: "token key", style: `background:rgba(214,60,50,${shade(Math.log(share))})` }, `${share * 100} %`)));
}

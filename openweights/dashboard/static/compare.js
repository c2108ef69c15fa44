// Any number of jobs in one chart, and in one table; the address holds all choices.

import { breakable, fill, h, number, pause, shortText, status, valueText } from "./dom.js";
import { get } from "./api.js";
import { colour, csv, draw, library, look, picture, smoothed, stepAxis } from "./charts.js";
import { current, remember, to } from "./route.js";

const AXES = { step: "step", samples: "samples seen", time: "minutes since the start", clock: "time of day", cost: "USD" };
const POINTS = 250; // pixels with up to four points each
const COLUMN = 135; // pixels that a value and its change take

export async function show(view, { query, signal }) {
  let ids = [...new Set((query.jobs || "").split(",").filter(Boolean))];
  const state = { x: "step", y: "", smooth: "0", group: "", sx: "", sy: "", sort: "", order: "desc", all: "", ...query };
  const input = h("input", { value: ids.join(","), size: 60, "aria-label": "Job ids", placeholder: "job ids, with commas between" });
  const open = (event) => { event.preventDefault(); location.hash = to("compare", "", { ...state, jobs: input.value.replaceAll(" ", "") }); };
  view.append(h("h1", {}, "Compare"), h("form", { class: "bar", onsubmit: open }, h("label", {}, "Jobs ", input), h("button", { class: "main" }, "Show"), h("a", { href: "#/jobs" }, "choose in the table")));
  if (!ids.length) { view.append(h("p", { class: "empty" }, "Tick jobs in the table and press c, or name them here.")); return; }

  library();
  const reading = h("p", { class: "faint" });
  view.append(reading);
  let found, asked, scored = {}, ownNames = {};
  const plain = Object.create(null); // what a job itself calls a measure that is set apart here
  let { jobs, differing, telling, missing, headings, unmeasured, asked_elsewhere: askable } = await compare();
  if (missing.length) view.append(h("p", { class: "problem" }, `Not in this store: ${missing.join(", ")}`));
  const ranks = Object.fromEntries(Object.values(found).flatMap((one) => Object.entries(one.measures).map(([measure, [, , rank]]) => [measure, rank])));
  const names = Object.keys(ranks).sort((a, b) => ranks[a] - ranks[b] || ((plain[a] ?? a) === (plain[b] ?? b) ? 0 : a.localeCompare(b)));
  // Under a measure's own name all kinds of it, each with its chart: "loss (sft)" and "loss (dpo)" cannot share one.
  const kinds = Object.create(null);
  for (const name of names) (kinds[plain[name] ?? name] ??= []).push(name);
  if (!names.length) { reading.remove(); view.append(h("p", { class: "empty" }, "These jobs have measured nothing yet."), table());
    while (!signal.aborted && isRunning()) {
      await pause(3000);
      if (document.hidden || signal.aborted) continue;
      ({ jobs } = await compare());
      if (Object.values(found).some((one) => Object.keys(one.measures).length)) { await show(fill(view), { query: current().query, signal }); return; }
      view.lastChild.replaceWith(table());
    }
    return;
  }
  if (!state.y || (!kinds[state.y] && !names.includes(state.y))) state.y = first();
  if (state.y !== asked) found = await series();
  reading.remove();

  const charts = h("div"), drawn = new Map();
  const scatter = h("div", { class: "chart tall", role: "img", "aria-label": "last values of two measures" });
  const last = h("div"), without = h("div"), elsewhere = h("div");
  const groups = ["", ...differing.filter((name) => name !== "seed")];
  const between = (name) => { const values = [...new Set(jobs.map(({ params }) => shortened(shortText(params[name]))))]; return `${name}: ${values.slice(0, 4).join(", ")}${values.length > 4 ? ", …" : ""}`; };
  const priced = jobs.some(({ usd_per_hour: price }) => price);
  const axes = Object.keys(AXES).filter((name) => name !== "cost" || priced || state.x === "cost");
  const change = async (key, value) => {
    state[key] = value;
    remember({ [key]: value });
    if (key === "y") found = await series();
    await paint();
  };
  const choice = (label, key, values, titles = {}, name = label.trim()) => h("label", {}, label, h("select", { "aria-label": name, onchange: (event) => change(key, event.target.value) }, values.map((value) => h("option", { value, selected: value === state[key] }, titles[value] ?? value))));
  view.append(
    h("div", { class: "bar" }, choice("y ", "y", Object.keys(kinds), { "": "(no name)" }), choice("x ", "x", axes, AXES), choice("group by ", "group", groups, { "": "nothing", ...Object.fromEntries(differing.map((name) => [name, between(name)])) }),
      h("label", {}, "smooth ", h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: state.smooth, oninput: (event) => change("smooth", event.target.value) })),
      h("span", { class: "spread bar", style: "margin-bottom:0" }, ["png", "svg"].map((format) => h("button", { type: "button", onclick: async () => { for (const name of shownKinds()) await picture(drawn.get(name), `compare-${name.replace(/\W+/g, "-")}`, format); } }, format.toUpperCase())),
        h("button", { type: "button", onclick: () => csv("compare.csv", rows()) }, "CSV"))),
    charts, without, h("h2", {}, "Where they ended"), columnChoice(), last, elsewhere,
    h("h2", {}, "One last value against another"),
    h("div", { class: "bar" }, choice("x ", "sx", ["", ...tasks(), ...names], { "": "choose" }, "x of last values"), choice("y ", "sy", ["", ...tasks(), ...names], { "": "choose" }, "y of last values"),
      h("button", { type: "button", class: "spread", onclick: () => picture(scatter, "frontier", "png") }, "PNG")), scatter);
  await paint();
  while (!signal.aborted && isRunning()) {
    await pause(3000);
    if (document.hidden || signal.aborted) continue;
    ({ jobs, differing, telling, headings, unmeasured, asked_elsewhere: askable } = await compare());
    await paint();
  }

  /** Where all of the jobs have a reward, it tells more than their losses. */
  function first() { return jobs.every(({ id }) => Object.keys(found[id].measures).some((name) => (plain[name] ?? name) === "reward")) ? "reward" : kinds.loss ? "loss" : names[0]; }

  function isRunning() { return jobs.some(({ status: name }) => name === "in_progress" || name === "pending"); }

  async function compare() {
    const answer = await get("/api/compare", { jobs: ids.join(",") }, signal);
    ids = answer.jobs.map(({ id }) => id);
    ownNames = Object.fromEntries(answer.jobs.map(({ id, apart: own }) => [id, own]));
    const [read, scores] = await Promise.all([series(), get("/api/scores", { jobs: ids.join(",") }, signal)]);
    found = read;
    // As a measure: from the score of the evaluation's first model to that of the job's.
    scored = {};
    for (const { job, task, score, difference } of scores) (scored[job] ??= Object.create(null))[task] = [score - (difference?.[0] ?? 0), score];
    return answer;
  }

  async function series() {
    asked = state.y || "loss";
    const measure = plain[asked] ?? asked;
    for (;;) {
      const answer = await get("/api/series", { jobs: ids.join(","), names: measure, points: POINTS }, signal);
      const partly = Object.values(answer).filter(({ complete }) => !complete).length;
      if (!partly) return apart(answer);
      reading.textContent = `Reading long histories: ${partly} to go…`;
    }
  }

  /** The series under names that mean the same in all of the jobs, as the server says. */
  function apart(answer) {
    for (const [id, one] of Object.entries(answer)) {
      const own = Object.assign(Object.create(null), ownNames[id]);
      const called = (name) => { const [bare] = name.split("[", 1); const shown = (own[bare] ?? bare) + name.slice(bare.length); if (shown !== name) plain[shown] = name; return shown; };
      for (const key of ["measures", "series"]) one[key] = Object.assign(Object.create(null), Object.fromEntries(Object.entries(one[key]).map(([name, value]) => [called(name), value])));
    }
    return answer;
  }

  /** The measures that are drawn, a chart for each. */
  function shownKinds() { return kinds[state.y] ?? [state.y]; }

  function xs(job, one) {
    const { started } = found[job.id];
    switch (state.x) {
      case "samples": return one.step.map((step) => step * (job.params.per_device_train_batch_size || 1) * (job.params.gradient_accumulation_steps || 1));
      case "time": return one.time.map((time) => (time - started) / 60);
      case "clock": return one.time.map((time) => new Date(time * 1000));
      case "cost": return one.time.map((time) => (job.usd_per_hour ? (time - started) / 3600 * job.usd_per_hour : null));
      default: return one.step;
    }
  }

  async function paint() {
    const own = shownKinds();
    fill(charts, own.length > 1 && h("p", { class: "faint" }, `“${state.y}” is of different things in these jobs: each has a chart of its own.`),
      h("div", { class: own.length > 1 ? "panels" : "" }, own.map((measure) => {
        if (!drawn.has(measure)) drawn.set(measure, h("div", { role: "img", "aria-label": `overlay of ${measure}` }));
        drawn.get(measure).className = own.length > 1 ? "chart" : "chart tall";
        return own.length > 1 ? h("section", { class: "panel" }, h("h2", {}, measure), drawn.get(measure)) : drawn.get(measure);
      })));
    fill(last, table());
    lacking();
    await Promise.all(own.map(overlay));
    await points();
  }

  /** What is not drawn, and why; below the table what a parameter would have measured. */
  function lacking() {
    const own = new Set(shownKinds().map((name) => plain[name] ?? name));
    const lines = (of, isDrawn) => of.filter(({ measure }) => own.has(measure) === isDrawn).map(({ words }) => h("p", { class: "faint lacking" }, words));
    fill(without, lines(unmeasured, true));
    fill(elsewhere, lines(askable, false));
  }

  async function overlay(measure) {
    const lines = jobs.map((job, at) => ({ job, at, one: found[job.id].series[measure] })).filter(({ one }) => one).map(({ job, at, one }) => ({ job, at, x: xs(job, one), y: smoothed(one.value, Number(state.smooth)) }));
    const keys = [...new Set(jobs.map((job) => shortText(job.params[state.group])))];
    // One colour for a job, or a group, in all charts.
    const traces = state.group ? bands(lines, ({ job }) => shortText(job.params[state.group]), state.group, keys)
      : lines.map(({ job, at, x, y }) => ({ x, y, name: name(job), mode: x.length < 40 ? "lines+markers" : "lines", line: look(at) }));
    const whole = state.x === "step" || state.x === "samples";
    await draw(drawn.get(measure), traces, { xaxis: whole ? stepAxis(AXES[state.x], traces) : { title: { text: AXES[state.x] } }, yaxis: { title: { text: measure } } });
  }

  async function points() {
    scatter.hidden = !state.sx || !state.sy;
    if (scatter.hidden) return;
    const traces = jobs.flatMap((job, at) => {
      const [x, y] = [state.sx, state.sy].map((measure) => ends(job, measure)[1]);
      return x === null || y === null ? [] : [{ x: [x], y: [y], name: name(job), mode: "markers", marker: { size: 12, color: colour(at) } }];
    });
    await draw(scatter, traces, { xaxis: { title: { text: `last ${state.sx}` } }, yaxis: { title: { text: `last ${state.sy}` } } });
  }

  function columnChoice() {
    return h("div", { class: "bar" }, h("label", {}, h("input", { type: "checkbox", checked: Boolean(state.all), onchange: (event) => change("all", event.target.checked ? "1" : "") }),
      `every parameter that differs, and every measure (${differing.length + names.length})`));
  }

  function ends(job, measure) { return scored[job.id]?.[measure] || found[job.id]?.measures[measure] || [null, null]; }

  /** What a parameter's column is called: not as a measure is, of which the jobs may have their own. */
  function heading(key) { return key in kinds ? `params.${key}` : headings[key]; }

  /** What evaluations have asked the jobs' models, in their order. */
  function tasks() { return [...new Set(Object.values(scored).flatMap(Object.keys))]; }

  function rows() {
    return jobs.flatMap((job) => shownKinds().flatMap((measure) => {
      const one = found[job.id].series[measure];
      const own = Object.fromEntries(differing.map((key) => [heading(key), job.params[key]]));
      return one ? one.step.map((step, at) => ({ job: job.id, ...own, measure, step, value: one.value[at], time: new Date(one.time[at] * 1000).toISOString() })) : [];
    }));
  }

  /** A row for each job: what differs, and of each measure its last value and how far it has moved;
   * what tells the jobs apart, and as many measures as fit, until all is asked for. */
  function table() {
    const keys = state.all ? differing : telling;
    const asked = [...tasks(), ...shownKinds(), state.sx, state.sy, state.sort && !differing.map(heading).includes(state.sort) && state.sort !== "status" && state.sort].filter(Boolean);
    const room = Math.max(Math.floor((view.clientWidth - 300) / COLUMN) - keys.length, 2);
    // What few of them have measured says little beside the others.
    const shared = names.filter((measure) => state.all || 2 * jobs.filter((job) => ends(job, measure)[1] !== null).length >= jobs.length);
    const shown = [...new Set([...asked, ...shared])].slice(0, state.all ? undefined : Math.max(room, new Set(asked).size));
    const columns = [["status", (job) => job.status], ...keys.map((key) => [heading(key), (job) => job.params[key]]), ...shown.map((measure) => [measure, (job) => ends(job, measure)[1]])];
    const value = (columns.find(([title]) => title === state.sort) || [])[1];
    const turn = state.order === "desc" ? -1 : 1;
    const missing = (one) => one === null || one === undefined;
    const ordered = value ? [...jobs].sort((a, b) => missing(value(a)) - missing(value(b)) || turn * compared(value(a), value(b))) : jobs;
    const head = ([title]) => h("th", { scope: "col", "aria-sort": title === state.sort ? (state.order === "desc" ? "descending" : "ascending") : null },
      h("button", { type: "button", onclick: () => { state.order = state.sort === title && state.order === "desc" ? "asc" : "desc"; change("sort", title); remember({ order: state.order }); } }, h("span", { class: "clip", title }, breakable(title || "(no name)")), title && title === state.sort && (state.order === "desc" ? " ↓" : " ↑")));
    return h("div", { class: "scroll" }, h("table", { class: "last" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Job"), columns.map(head))),
      h("tbody", {}, ordered.map((job) => h("tr", { "data-row": job.id }, h("th", { scope: "row" }, h("a", { href: to("job", job.id), class: "mono", title: job.id }, job.id)),
        h("td", {}, status(job.status), job.error && h("div", { class: "problem clip", title: job.error }, job.error)),
        keys.map((key) => h("td", { class: "wrap" }, h("div", { class: "clip", title: valueText(job.params[key]) }, shortText(job.params[key])))),
        shown.map((measure) => h("td", { class: "number" }, moved(ends(job, measure)))))))));
  }

  /** What tells a job apart from the others, where that is short. */
  function name(job) {
    const said = jobs.map(({ params }) => telling.map((key) => `${key.replace("meta.", "")}=${shortText(params[key])}`).join(" "));
    const own = said[jobs.indexOf(job)];
    return own && own.length <= 80 && said.indexOf(own) === said.lastIndexOf(own) ? own : job.id;
  }
}

/** The last value, and how far it is from the first one. */
function moved([first, last]) {
  if (last === null) return "–";
  const by = last - first;
  return by ? [number(last), h("span", { class: "faint" }, ` ${by > 0 ? "+" : "−"}${number(Math.abs(by))}`)] : number(last);
}

function compared(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : valueText(a).localeCompare(valueText(b));
}

/** A value as short as a list of choices has room for. */
const shortened = (text) => (text.length > 24 ? `${text.slice(0, 23)}…` : text);

/** Mean and, from lowest to highest, the band of the lines with one key, which has its colour by its place in `keys`. */
function bands(lines, keyOf, title, keys) {
  const groups = new Map();
  for (const line of lines) groups.set(keyOf(line), [...(groups.get(keyOf(line)) || []), line]);
  return [...groups].flatMap(([key, members]) => {
    const at = keys.indexOf(key);
    const steps = [...new Set(members.flatMap(({ x }) => x.map(Number)))].sort((a, b) => a - b);
    const values = members.map((member) => interpolated(member, steps));
    const columns = steps.map((_, i) => values.map((one) => one[i]).filter((value) => value !== null));
    const of = (pick) => columns.map((column) => (column.length ? pick(column) : null));
    const edge = { x: steps, mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" };
    return [{ ...edge, y: of((column) => Math.min(...column)) },
      { ...edge, y: of((column) => Math.max(...column)), fill: "tonexty", fillcolor: `${colour(at)}33` },
      { x: steps, y: of((column) => column.reduce((sum, value) => sum + value, 0) / column.length), name: `${title}=${key} (${members.length})`, mode: "lines", line: { ...look(at), width: 2.5 } }];
  });
}

function interpolated({ x, y }, steps) {
  const place = x.map(Number);
  let at = 0;
  return steps.map((step) => {
    if (step < place[0] || step > place.at(-1)) return null;
    while (at < place.length - 2 && place[at + 1] < step) at += 1;
    const [x0, x1] = [place[at], place[at + 1] ?? place[at]];
    if (y[at] === null || (y[at + 1] ?? null) === null) return y[at];
    return x1 === x0 ? y[at] : y[at] + (y[at + 1] - y[at]) * (step - x0) / (x1 - x0);
  });
}

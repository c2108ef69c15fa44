// Any number of jobs in one chart; the address holds all choices.

import { fill, h, number, valueText } from "./dom.js";
import { get, job as jobPath } from "./api.js";
import { colour, csv, draw, picture, smoothed } from "./charts.js";
import { remember, to } from "./route.js";

const AXES = { step: "step", samples: "samples seen", time: "minutes since the start", clock: "time of day" };

export async function show(view, { query, signal }) {
  const ids = [...new Set((query.jobs || "").split(",").filter(Boolean))];
  const state = { x: "step", y: "loss", smooth: "0", group: "", sx: "", sy: "", ...query };
  const input = h("input", { value: ids.join(","), size: 60, "aria-label": "Job ids", placeholder: "job ids, with commas between" });
  const open = (event) => { event.preventDefault(); location.hash = to("compare", "", { ...state, jobs: input.value.replaceAll(" ", "") }); };
  view.append(h("h1", {}, "Compare"), h("form", { class: "bar", onsubmit: open }, h("label", {}, "Jobs ", input), h("button", { class: "main" }, "Show"), h("a", { href: "#/jobs" }, "choose in the table")));
  if (!ids.length) { view.append(h("p", { class: "empty" }, "Tick jobs in the table and press c, or name them here.")); return; }

  const reading = h("p", { class: "faint" });
  view.append(reading);
  const jobs = (await Promise.all(ids.map((id) => get(jobPath(id), {}, signal)))).map((job) => ({ ...job, values: Object.fromEntries(job.params.map(({ name, value }) => [name, value])) }));
  let found = await series();
  reading.remove();
  const names = [...new Set(Object.values(found).flatMap((one) => Object.keys(one.series)))].sort();
  if (!names.length) { view.append(h("p", { class: "empty" }, "These jobs have measured nothing yet.")); return; }
  if (!names.includes(state.y)) state.y = names.includes("loss") ? "loss" : names[0];

  const chart = h("div", { class: "chart tall", role: "img", "aria-label": "overlay of the chosen measure" });
  const scatter = h("div", { class: "chart tall", role: "img", "aria-label": "last values of two measures" });
  const groups = ["", ...differing(jobs).filter((name) => name !== "seed" && name !== "job_id_suffix")];
  const choice = (label, key, values, titles = {}) => h("label", {}, label, h("select", { onchange: (event) => { state[key] = event.target.value; remember({ [key]: state[key] }); paint(); } }, values.map((value) => h("option", { value, selected: value === state[key] }, titles[value] ?? value))));
  view.append(
    h("div", { class: "bar" }, choice("y ", "y", names), choice("x ", "x", Object.keys(AXES), AXES), choice("group by ", "group", groups, { "": "nothing" }),
      h("label", {}, "smooth ", h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: state.smooth, oninput: (event) => { state.smooth = event.target.value; remember({ smooth: state.smooth }); paint(); } })),
      h("span", { class: "spread bar", style: "margin-bottom:0" }, ["png", "svg"].map((format) => h("button", { type: "button", onclick: () => picture(chart, `compare-${state.y.replaceAll("/", "-")}`, format) }, format.toUpperCase())),
        h("button", { type: "button", onclick: () => csv("compare.csv", rows()) }, "CSV"))),
    chart, h("h2", {}, "Last values, one measure against another"),
    h("div", { class: "bar" }, choice("x ", "sx", ["", ...names], { "": "choose" }), choice("y ", "sy", ["", ...names], { "": "choose" }),
      h("button", { type: "button", class: "spread", onclick: () => picture(scatter, "frontier", "png") }, "PNG")), scatter,
    h("h2", {}, "What differs"), parameterTable());
  await paint();
  while (!signal.aborted && jobs.some(({ status }) => status === "in_progress" || status === "pending")) {
    await new Promise((resolve) => { setTimeout(resolve, 3000); });
    if (document.hidden || signal.aborted) continue;
    found = await series();
    await paint();
  }

  async function series() {
    for (;;) {
      const answer = await get("/api/series", { jobs: ids.join(","), points: 500 }, signal);
      const partly = Object.values(answer).filter(({ complete }) => !complete).length;
      if (!partly) return answer;
      reading.textContent = `Reading long histories: ${partly} to go…`;
    }
  }

  function xs(job, one) {
    const started = found[job.id].started;
    if (state.x === "samples") {
      const batch = (job.values.per_device_train_batch_size || 1) * (job.values.gradient_accumulation_steps || 1);
      return one.step.map((step) => step * batch);
    }
    if (state.x === "time") return one.time.map((time) => (time - started) / 60);
    if (state.x === "clock") return one.time.map((time) => new Date(time * 1000));
    return one.step;
  }

  async function paint() {
    const lines = jobs.filter((job) => found[job.id].series[state.y]).map((job) => {
      const one = found[job.id].series[state.y];
      return { job, x: xs(job, one), y: smoothed(one.value, Number(state.smooth)) };
    });
    const traces = state.group ? bands(lines) : lines.map(({ job, x, y }, at) => ({ x, y, name: name(job), mode: x.length < 40 ? "lines+markers" : "lines", line: { color: colour(at) } }));
    await draw(chart, traces, { xaxis: { title: { text: AXES[state.x] } }, yaxis: { title: { text: state.y } } });
    await points();
  }

  /** Mean and, from lowest to highest, the band of the jobs with one value of the parameter. */
  function bands(lines) {
    const groupsOf = Map.groupBy ? Map.groupBy(lines, keyOf) : grouped(lines);
    return [...groupsOf].flatMap(([key, members], at) => {
      const steps = [...new Set(members.flatMap(({ x }) => x.map(Number)))].sort((a, b) => a - b);
      const at_ = members.map((member) => interpolated(member, steps));
      const columns = steps.map((_, i) => at_.map((values) => values[i]).filter((value) => value !== null));
      const mean = columns.map((values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null));
      const edge = (pick) => columns.map((values) => (values.length ? pick(...values) : null));
      const title = `${state.group}=${key} (${members.length})`;
      const filled = `${colour(at)}33`;
      return [{ x: steps, y: edge(Math.min), mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" },
        { x: steps, y: edge(Math.max), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: filled, showlegend: false, hoverinfo: "skip" },
        { x: steps, y: mean, name: title, mode: "lines", line: { color: colour(at), width: 2.5 } }];
    });
  }

  function keyOf({ job }) { return valueText(lookup(job, state.group)); }
  function grouped(lines) {
    const map = new Map();
    for (const line of lines) map.set(keyOf(line), [...(map.get(keyOf(line)) || []), line]);
    return map;
  }

  async function points() {
    if (!state.sx || !state.sy) { scatter.hidden = true; return; }
    scatter.hidden = false;
    const traces = jobs.flatMap((job, at) => {
      const [x, y] = [state.sx, state.sy].map((measure) => found[job.id].series[measure]?.value.findLast((value) => value !== null));
      return x === undefined || y === undefined ? [] : [{ x: [x], y: [y], name: name(job), mode: "markers", marker: { size: 12, color: colour(at) } }];
    });
    await draw(scatter, traces, { xaxis: { title: { text: state.sx } }, yaxis: { title: { text: state.sy } } });
  }

  function rows() {
    return jobs.flatMap((job) => Object.entries(found[job.id].series).flatMap(([measure, one]) => one.step.map((step, at) => ({ job: job.id, measure, step, value: one.value[at], time: new Date(one.time[at] * 1000).toISOString() }))));
  }

  function parameterTable() {
    const different = differing(jobs);
    const measures = names.filter((measure) => !/_s$|per_s/.test(measure)).slice(0, 40);
    const line = (title, cells) => h("tr", {}, h("th", { scope: "row" }, title), cells.map((cell) => h("td", { class: "wrap" }, cell)));
    return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), jobs.map((job) => h("th", { scope: "col" }, h("a", { href: to("job", job.id) }, job.id))))),
      h("tbody", {}, line("status", jobs.map(({ status }) => status)), different.map((key) => line(key, jobs.map((job) => valueText(lookup(job, key))))),
        measures.map((measure) => line(`last ${measure}`, jobs.map((job) => number(found[job.id].series[measure]?.value.findLast((value) => value !== null))))))));
  }

  function name(job) {
    const parts = differing(jobs).filter((key) => !/file|meta$/.test(key)).slice(0, 3).map((key) => `${key.replace("meta.", "")}=${valueText(lookup(job, key))}`);
    return parts.length ? parts.join(" ") : job.id;
  }
}

function lookup(job, key) {
  return key.startsWith("meta.") ? job.values.meta?.[key.slice(5)] : job.values[key];
}

/** Parameters, and keys of `meta`, whose values are not the same in all jobs; those that only some
 * jobs have, and leave at their default, do not count. */
function differing(jobs) {
  const chosen = new Set(jobs.flatMap(({ params }) => params.filter(({ differs }) => differs).map(({ name }) => name)));
  const everywhere = (key) => jobs.every(({ values }) => key in values);
  const names = [...new Set(jobs.flatMap(({ values }) => Object.keys(values)))].filter((key) => key !== "meta" && (chosen.has(key) || everywhere(key)));
  const keys = [...names, ...new Set(jobs.flatMap(({ values }) => Object.keys(values.meta || {}).map((key) => `meta.${key}`)))];
  return keys.filter((key) => new Set(jobs.map((job) => JSON.stringify(lookup(job, key)))).size > 1);
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

// A form for each kind of job, made from its schema; checked by the same checks as in Python.

import { fill, h, notice, valueText } from "./dom.js";
import { get, job as jobPath, post } from "./api.js";
import { to } from "./route.js";

const FIRST = ["model", "training_file", "loss", "learning_rate", "epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "r", "seed", "job_id_suffix", "meta", "command", "dataset"];
const CONTROLS = { cloud_type: "SECURE", allowed_hardware: "", requires_vram_gb: "", priority: "", timeout: "", max_cost_usd: "" };

export async function show(view, { query, signal }) {
  const kinds = await get("/api/kinds", {}, signal);
  let given = { ...(query.training_file ? { training_file: query.training_file } : {}) };
  let kind = "fine_tuning";
  if (query.from) {
    const job = await get(jobPath(query.from), {}, signal);
    if (kinds[job.made_by]) kind = job.made_by;
    given = Object.fromEntries(job.params.filter(({ differs }) => differs).map(({ name, value }) => [name, value]));
  }
  const choice = h("select", { "aria-label": "Kind of job", onchange: () => { kind = choice.value; render(); } }, Object.keys(kinds).sort().map((name) => h("option", { value: name, selected: name === kind }, name)));
  const form = h("form", { onsubmit: submit }), problems = h("pre", { class: "problem", hidden: true, role: "alert" });
  view.append(h("h1", {}, "New job"), h("div", { class: "bar" }, h("label", {}, "Kind ", choice), query.from && h("span", { class: "faint" }, `as ${query.from}`)), problems, form);
  render();

  function render() {
    const { schema, defaults, meanings } = kinds[kind];
    const names = Object.keys(schema.properties || {});
    const shown = names.filter((name) => FIRST.includes(name) || name in given || !(name in defaults)).sort((a, b) => order(a) - order(b));
    const field = (name) => input(name, schema.properties[name], defaults[name], schema.$defs || {}, given[name], meanings[name]);
    fill(form, h("div", { class: "fields" }, shown.map(field)),
      h("details", {}, h("summary", {}, `All other parameters (${names.length - shown.length})`), h("div", { class: "fields" }, names.filter((name) => !shown.includes(name)).map(field))),
      h("details", {}, h("summary", {}, "Where it runs"), h("div", { class: "fields" }, Object.entries(CONTROLS).map(([name, value]) => h("label", {}, name, h("input", { name: `control:${name}`, placeholder: value || "as usual" }))))),
      h("div", { class: "bar" }, h("button", { type: "button", onclick: check }, "Check"), h("button", { class: "main" }, "Submit")));
  }

  function body() {
    const { schema, defaults } = kinds[kind];
    const params = {};
    for (const element of form.elements) {
      if (!element.name || element.value === "") continue;
      if (element.name.startsWith("control:")) params[element.name.slice(8)] = parsed(element.value, {});
      else {
        const value = parsed(element.value, schema.properties[element.name] || {});
        if (!(element.name in defaults) || JSON.stringify(value) !== JSON.stringify(defaults[element.name])) params[element.name] = value;
      }
    }
    return { kind, params };
  }

  async function check() {
    try {
      const { problems: lines } = await post("/api/jobs/check", body());
      tell(lines);
      if (!lines.length) notice("nothing to object to");
    } catch (error) { tell([error.message]); }
  }

  async function submit(event) {
    event.preventDefault();
    try {
      const job = await post("/api/jobs", body());
      location.hash = to("job", job.id);
    } catch (error) { tell(error.message.split("\n")); }
  }

  function tell(lines) {
    problems.hidden = !lines.length;
    problems.textContent = lines.join("\n");
    for (const element of form.elements) if (element.name) element.toggleAttribute("aria-invalid", lines.some((line) => line.startsWith(`${element.name}:`)));
    if (lines.length) problems.scrollIntoView({ block: "center" });
  }
}

const order = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : 100);

function input(name, schema, usual, definitions, value, meaning) {
  const kinds = [schema, ...(schema.anyOf || []), ...(schema.allOf || [])].map((one) => (one.$ref ? definitions[one.$ref.split("/").pop()] || {} : one));
  const choices = kinds.flatMap((one) => one.enum || (one.const !== undefined ? [one.const] : []));
  const current = value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value);
  const placeholder = usual === undefined ? "required" : valueText(usual);
  let element;
  if (choices.length && kinds.every((one) => one.enum || one.const !== undefined || one.anyOf || one.type === "null" || one.$ref)) element = h("select", { name }, h("option", { value: "" }, placeholder), choices.map((item) => h("option", { value: item, selected: String(item) === current }, String(item))));
  else if (kinds.some((one) => one.type === "boolean") && kinds.every((one) => [undefined, "boolean", "null"].includes(one.type))) element = h("select", { name }, h("option", { value: "" }, placeholder), ["true", "false"].map((item) => h("option", { value: item, selected: item === current }, item)));
  else element = h("input", { name, value: current, placeholder, autocomplete: "off" });
  return h("label", {}, name, element, meaning && h("span", { class: "hint" }, coded(meaning)));
}

/** A text whose names stand in backticks. */
const coded = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

/** What was typed, as JSON where it is JSON and the field is more than a text. */
function parsed(text, schema) {
  const onlyText = schema.type === "string" || (schema.anyOf && schema.anyOf.every((one) => ["string", "null"].includes(one.type)));
  if (onlyText) return text;
  try { return JSON.parse(text); } catch { return text; }
}

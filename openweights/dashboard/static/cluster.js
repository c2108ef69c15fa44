// Who works for this store, what waits and why; in a project what it costs, and its keys and members.

import { ask, breakable, copy, fill, h, notice, pause, shortModel, when } from "./dom.js";
import { get, post } from "./api.js";
import { colour, draw } from "./charts.js";
import { to } from "./route.js";

const usd = (value) => (value === null || value === undefined ? "–" : `$${Number(value).toFixed(2)}`);

export async function show(view, { signal }) {
  const { project } = await get("/api/state", {}, signal);
  const workers = h("div"), queue = h("div");
  view.append(h("h1", {}, "Cluster"), workers, queue);
  const live = follow(workers, queue, signal);
  if (project) {
    const spent = h("div"), people = h("div");
    view.append(spent, people);
    await Promise.all([costs(spent, signal), team(people, signal)]);
  }
  await live;
}

async function follow(workers, queue, signal) {
  while (!signal.aborted) {
    const found = await get("/api/cluster", {}, signal);
    const ended = found.workers.filter((worker) => worker.status === "terminated"), living = found.workers.filter((worker) => !ended.includes(worker));
    fill(workers, h("h2", {}, `Workers${found.usd_per_hour === null ? "" : `, ${usd(found.usd_per_hour)} an hour`}`), living.length ? workerTable(living) : h("p", { class: "faint" }, found.usd_per_hour === null ? "None. On this machine one starts when a job is submitted." : "None."),
      ended.length > 0 && h("details", {}, h("summary", {}, `${ended.length} that have ended`), workerTable(ended)));
    fill(queue, h("h2", {}, `Queue, ${found.waiting.toLocaleString("en")} waiting`), found.queue.length > 0 && table(["Job", "Model", "Waits since", "Waits", ""], found.queue.map((job) => [
      h("a", { class: "mono", href: to("job", job.id) }, job.id), job.model ? h("div", { class: "clip", title: job.model }, breakable(shortModel(job.model))) : "", when(job.since), job.reason, job.owner ? h("span", { class: "faint mono" }, job.owner.slice(0, 8)) : ""])));
    await pause(3000);
  }
}

/** Without the columns of which no worker has anything, as of pods on this machine. */
function workerTable(rows) {
  const columns = [["Worker", (one) => h("span", { class: "mono" }, one.id)], ["Status", (one) => one.status], ["Job", (one) => one.job && h("a", { class: "mono", href: to("job", one.job) }, one.job)], ["Hardware", (one) => one.hardware],
    ["Memory", (one) => one.vram_gb && `${one.vram_gb} GB`], ["Cloud", (one) => one.cloud], ["Pod", (one) => one.pod && h("span", { class: "mono" }, one.pod)], ["USD an hour", (one) => one.usd_per_hour !== null && usd(one.usd_per_hour)], ["Last heard of", (one) => when(one.pinged)]];
  const filled = columns.filter(([, cell]) => rows.some(cell));
  return table(filled.map(([title]) => title), rows.map((row) => filled.map(([, cell]) => cell(row) || "–")));
}

async function costs(place, signal) {
  const found = await get("/api/costs", {}, signal);
  const chart = h("div", { class: "chart", role: "img", "aria-label": "USD by day" });
  fill(place, h("h2", {}, "Costs"), h("p", {}, `${usd(found.total_usd)} in all: ${usd(found.direct_usd)} for jobs, ${usd(found.overhead_usd)} for starting and waiting`, found.unpriced_workers > 0 && `; the prices of ${found.unpriced_workers} workers are not known`),
    chart, h("div", { class: "two" },
      section("By key", ["Key", "Member", "USD", "Budget"], found.keys.map((key) => [key.name, key.email, usd(key.spent_usd), usd(key.budget_usd)])),
      section("By member", ["Member", "Jobs", "USD"], found.members.map((member) => [member.email, String(member.jobs), usd(member.usd)])),
      section("By job", ["Job", "Runs", "USD"], found.jobs.map((job) => [h("a", { class: "mono", href: to("job", job.job_id) }, job.job_id), String(job.runs), usd(job.usd)]))));
  await draw(chart, [{ type: "bar", x: found.days.map(({ day }) => day), y: found.days.map((one) => one.usd), name: "USD", marker: { color: colour(0) } }], { showlegend: false, bargap: 0.2, yaxis: { title: { text: "USD" }, rangemode: "tozero" } });
}

const section = (title, heads, rows) => h("section", {}, h("h3", {}, title), rows.length ? table(heads, rows) : h("p", { class: "faint" }, "nothing"));

function table(heads, rows) {
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((title) => h("th", { scope: "col" }, title)))), h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", { class: "wrap" }, cell)))))));
}

async function team(place, signal) {
  const state = await get("/api/team", {}, signal);
  if (!state.keys) return;
  const change = async (verb, body) => {
    try {
      const made = await post(`/api/team/${verb}`, body);
      await team(place, signal);
      if (made.key) place.prepend(h("div", { class: "panel", role: "status" }, h("p", {}, "The new key; it is shown this once, and stored nowhere:"), h("div", { class: "bar" }, h("code", { class: "newkey" }, made.key), h("button", { type: "button", onclick: () => copy(made.key) }, "Copy"))));
    } catch (error) { notice(error.message, true); }
  };
  const asked = (question, action, verb, body) => ask(question, action).then((yes) => yes && change(verb, body));
  fill(place, h("h2", {}, "Keys"), table(["Key", "Name", "Role", "Member", "State", "Used", "USD", "Budget", ""], state.keys.map((key) => [
    h("span", { class: "mono" }, `${key.prefix}…`), key.name, key.role, key.email, keyState(key), key.used ? when(key.used) : "never", usd(key.spent_usd), usd(key.budget_usd),
    !key.revoked && h("button", { type: "button", class: "danger", "aria-label": `Revoke ${key.name}`, onclick: () => asked(`Revoke the key “${key.name}”? From its next request on it is refused.`, "Revoke the key", "revoke-key", { id: key.id }) }, "Revoke")])),
  form("New key", { name: "", role: ["member", "admin", "worker"], member_id: state.members.map(({ id, email }) => [id, email]), budget_usd: 0, days: 0 }, (body) => change("create-key", body)),
  h("h2", {}, "Members"), table(["Member", "Role", "Since", ""], state.members.map((member) => [member.email, member.role, when(member.since),
    h("button", { type: "button", class: "danger", "aria-label": `Remove ${member.email}`, onclick: () => asked(`Remove ${member.email}? Their keys are dead from then on.`, "Remove the member", "remove-member", { id: member.id }) }, "Remove")])),
  form("New member", { email: "", role: ["member", "admin"] }, (body) => change("add-member", body)));
}

const TITLES = { name: "name", role: "role", member_id: "member", budget_usd: "budget in USD", days: "good for days", email: "e-mail" };

function form(title, fields, submit) {
  const inputs = Object.entries(fields).map(([name, kind]) => {
    const field = Array.isArray(kind) ? h("select", { name }, kind.map((item) => h("option", { value: [].concat(item)[0] }, [].concat(item).at(-1))))
      : h("input", { name, type: typeof kind === "number" ? "number" : "text", min: 0, step: "any", required: typeof kind === "string", size: 14, placeholder: typeof kind === "number" ? "no limit" : "" });
    return h("label", {}, TITLES[name], field);
  });
  const read = (event) => {
    event.preventDefault();
    const given = [...new FormData(event.target)].filter(([, value]) => value !== "");
    submit(Object.fromEntries(given.map(([name, value]) => [name, typeof fields[name] === "number" ? Number(value) : value])));
  };
  return h("form", { class: "bar", "aria-label": title, onsubmit: read }, inputs, h("button", { class: "main" }, title));
}

function keyState(key) {
  if (key.revoked) return "revoked";
  if (!key.expires) return "good";
  return new Date(key.expires) < new Date() ? "expired" : `good until ${new Date(key.expires).toLocaleDateString("en-CA")}`;
}

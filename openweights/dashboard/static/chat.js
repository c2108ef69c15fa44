// Talk to one or two models side by side.

import { fill, h, notice } from "./dom.js";
import { get } from "./api.js";
import { remember } from "./route.js";

export async function show(view, { query, signal }) {
  const done = await get("/api/jobs", { status: "completed", trained: 1, limit: 200 }, signal);
  const names = h("datalist", { id: "models" }, done.rows.flatMap((row) => [h("option", { value: row.id }, row.model), row.model && h("option", { value: row.model })]));
  const models = [query.a || "", query.b || ""];
  const inputs = ["a", "b"].map((key, at) => h("input", { value: models[at], list: "models", size: 36, "aria-label": at ? "Second model" : "Model", placeholder: at ? "a second model, if you like" : "a job, a model, a folder", onchange: (event) => { models[at] = event.target.value.trim(); remember({ [key]: models[at] }); reset(); } }));
  const system = h("input", { size: 60, "aria-label": "System text", placeholder: "system text, if any", onchange: () => reset() });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0.7, "aria-label": "Temperature" });
  const said = h("textarea", { rows: 3, cols: 80, "aria-label": "Your message", placeholder: "Say something (Ctrl-Enter sends)", onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(); } });
  const place = h("div", { class: "answers" });
  let turns = [[], []];
  view.append(h("h1", {}, "Chat"), names, h("div", { class: "bar" }, inputs, h("label", {}, "temperature ", temperature)), h("div", { class: "bar" }, system), place,
    h("div", { class: "bar" }, said, h("button", { type: "button", class: "main", onclick: () => send() }, "Send"), h("button", { type: "button", onclick: () => reset() }, "Start over")));

  function reset() { turns = [[], []]; fill(place); }

  async function send() {
    const text = said.value.trim();
    const chosen = models.map((name, at) => [name, at]).filter(([name]) => name);
    if (!chosen.length) { notice("Name a model first.", true); inputs[0].focus(); return; }
    if (!text) { said.focus(); return; }
    said.value = "";
    place.append(h("div", { class: "part" }, h("span", { class: "role" }, "you"), text));
    const sides = h("div", { class: "sides", style: `grid-template-columns:repeat(${innerWidth < 700 ? 1 : chosen.length},minmax(0,1fr))` });
    place.append(sides);
    await Promise.all(chosen.map(([name, at]) => answer(name, at, text, sides)));
  }

  async function answer(name, at, text, sides) {
    const body = h("span", {}, h("span", { class: "faint" }, "…loading, the first time takes a while"));
    sides.append(h("div", { class: "answer" }, h("div", { class: "faint" }, name), body));
    const messages = [...(system.value ? [{ role: "system", content: system.value }] : []), ...turns[at], { role: "user", content: text }];
    try {
      let full = "";
      for await (const piece of stream({ model: name, messages, temperature: Number(temperature.value), stream: true }, signal)) {
        full += piece;
        body.textContent = full;
      }
      turns[at] = [...turns[at], { role: "user", content: text }, { role: "assistant", content: full }];
      if (!full) body.textContent = "(nothing)";
    } catch (error) { if (!signal.aborted) { fill(body, h("span", { class: "problem" }, error.message)); notice(error.message, true); } }
  }
}

async function* stream(body, signal) {
  const response = await fetch("/api/chat", { method: "POST", signal, headers: { "x-openweights": "page", "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error || response.statusText);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data).choices[0]?.delta?.content || "";
    }
  }
}

// Which view is shown, and the keys: / search, j and k through rows, Enter open, c compare.

import { fill, h, notice } from "./dom.js";
import { get, post, Refused } from "./api.js";
import { current } from "./route.js";

const VIEWS = { jobs: "jobs.js", job: "job.js", compare: "compare.js", samples: "samples.js", data: "data.js", new: "new.js", chat: "chat.js", cluster: "cluster.js" };
const view = document.getElementById("view");
let leave = () => {};

async function show(moved = false) {
  leave();
  leave = () => {};
  const { page, id, query } = current();
  const name = VIEWS[page] ? page : page === "login" ? "login" : "jobs";
  for (const link of document.querySelectorAll("nav a")) {
    const shown = link.hash === `#/${name}` || (name === "job" && link.hash === "#/jobs");
    if (shown) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `${id || document.querySelector("nav a[aria-current]")?.textContent || "Log in"} · openweights`;
  if (name === "login") return login();
  const stop = new AbortController();
  leave = () => stop.abort();
  try {
    const module = await import(`./${VIEWS[name]}`);
    if (stop.signal.aborted) return undefined;
    fill(view);
    // Who followed a link that is gone stands at the beginning of what it led to.
    if (moved && document.activeElement === document.body) view.focus({ preventScroll: true });
    await module.show(view, { id, query, signal: stop.signal });
  } catch (error) {
    if (!stop.signal.aborted) failed(error);
  }
}

export function failed(error) {
  if (error instanceof Refused && error.status === 401) return login();
  if (error.name === "AbortError") return undefined;
  return fill(view, h("h1", {}, "That did not work"), h("p", { class: "problem" }, error.message));
}

function login() {
  const key = h("input", { type: "password", name: "key", autocomplete: "off", required: true });
  const enter = async (event) => {
    event.preventDefault();
    try {
      await post("/login", { key: key.value });
      location.hash = "#/jobs";
      await start();
    } catch (error) { notice(error.message, true); }
  };
  fill(view, h("h1", {}, "Log in"),
    h("p", {}, "Open the address that ", h("code", {}, "ow serve"), " has printed; each address lets one browser in. Or give a key: that of your organization, or the one that the server printed."),
    h("form", { class: "bar", onsubmit: enter }, h("label", {}, "Key ", key), h("button", { class: "main" }, "Enter")));
}

async function start() {
  try {
    const state = await get("/api/state");
    document.getElementById("store").textContent = `${state.organization} · ${state.store} · ${state.version}`;
  } catch (error) { if (!(error instanceof Refused)) notice(error.message, true); }
  await show();
}

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() { document.documentElement.dataset.theme = localStorage.getItem("theme") || (dark.matches ? "dark" : "light"); }
theme.addEventListener("click", () => {
  localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
  show();
});
dark.addEventListener("change", () => { paint(); show(); });
paint();

// Fields in which a letter means something: a tick or a slider has no use for one.
const TYPED = "textarea, select, [contenteditable], input:not([type=checkbox], [type=radio], [type=range], [type=button], [type=submit], [type=file])";
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.(TYPED)) return;
  if (event.key === "/") {
    const search = view.querySelector("input[type=search]");
    if (search) { event.preventDefault(); search.focus(); }
  } else if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  else if (event.key === "c") view.querySelector("[data-key=c]")?.click();
});

function step(by) {
  const rows = [...view.querySelectorAll("tr[data-row]")];
  const at = rows.findIndex((row) => row.contains(document.activeElement));
  const next = rows[Math.min(Math.max(at + by, 0), rows.length - 1)];
  next?.querySelector("a")?.focus();
}

// The part behind # is the view.
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); view.focus(); });
addEventListener("hashchange", () => show(true));
start();

// Elements and texts. Everything that comes from the store goes through text nodes and attributes
// that hold no code, so markup in names, logs and completions stays text.

const LISTENERS = /^on([a-z]+)$/;

/** `h("td", {class: "number"}, "3")`: an element with attributes, listeners (`onclick`) and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    const event = LISTENERS.exec(name);
    if (event && typeof value === "function") element.addEventListener(event[1], value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * Puts `children` in place of what is there; who stood on one of these stands on its like again, and
 * what was unfolded stays so.
 */
export function fill(element, ...children) {
  const folded = folds(element);
  const held = document.activeElement, place = element !== held && element.contains(held) ? placeIn(element, held) : null;
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  for (const [said, one] of folds(element)) if (folded.has(said)) one.open = folded.get(said).open;
  if (place && !held.isConnected) like(element, place)?.focus({ preventScroll: true });
  return element;
}

const FOCUSED = "a[href], button, input, select, textarea, summary";
const words = (one) => `${one.tagName} ${one.getAttribute("aria-label") ?? one.textContent.replace(/[^\p{L}]/gu, "")}`;

/** What folds there, by what its line says, as far as that is said once. */
function folds(element) {
  const all = [...element.querySelectorAll("details")].map((one) => [words(one.querySelector("summary")), one]);
  return new Map(all.filter(([said]) => all.filter(([other]) => other === said).length === 1));
}

function placeIn(element, held) {
  const row = held.closest("tr[data-row]")?.dataset.row;
  return { row, said: words(held) };
}

function like(element, { row, said }) {
  return [...element.querySelectorAll(FOCUSED)].find((one) => one.closest("tr[data-row]")?.dataset.row === row && words(one) === said);
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function notice(text, bad = false) {
  const line = h("div", { class: bad ? "problem" : "" }, text);
  document.getElementById("notice").append(line);
  setTimeout(() => line.remove(), bad ? 12000 : 5000);
}

/** Asks before what cannot be taken back. */
export function ask(question, action) {
  return new Promise((resolve) => {
    const answer = (yes) => { dialog.close(); dialog.remove(); resolve(yes); };
    const dialog = h("dialog", { "aria-label": question, onclose: () => answer(false) },
      h("p", {}, question),
      h("div", { class: "bar" },
        h("button", { type: "button", onclick: () => answer(false) }, "No"),
        h("button", { type: "button", class: "danger", onclick: () => answer(true) }, action)));
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function status(name, word = name) {
  return h("span", { class: `status ${name}` }, word.replace("_", " "));
}

const FOUR_DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

/** A measure in four digits, without zeros that say nothing: 0.5, 5e-5, 12,350. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3).replace(/\.?0+e/, "e") : FOUR_DIGITS.format(value);
}

/** A name that may be broken after the signs that part it, instead of anywhere. */
export function breakable(name) {
  return name.split(/(?<=[/_.])/).flatMap((part, at) => (at ? [h("wbr"), part] : [part]));
}

// Signs that cannot be seen, and turn around what follows them.
const TURNS = /[\u0000-\u0008\u000b-\u001f\u007f\u202a-\u202e\u2066-\u2069]/g;

/** A value as openweights/number_words.py writes it: 5e-5, with every digit, within a list, too. */
export function valueText(value) {
  if (value === null || value === undefined) return "none";
  return (typeof value === "string" ? value : within(value)).replace(TURNS, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** The same in six digits, where a number was calculated, as 2e-4 / 3: for tables and legends. */
export function shortText(value) {
  return valueText(typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(6)) : value);
}

/** A model in a table: of a folder, and of what has a long name, the last part. */
export function shortModel(model) {
  return model.startsWith("/") || model.length > 36 ? model.split("/").findLast(Boolean) || model : model;
}

function within(value) {
  if (typeof value === "number") return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
  if (Array.isArray(value)) return `[${value.map(within).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${within(one)}`).join(", ")}}`;
  return JSON.stringify(value) ?? "none";
}

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  let at = 0;
  while (bytes >= 1000 && at < units.length - 1) { bytes /= 1000; at += 1; }
  return `${at ? Number(bytes.toPrecision(3)) : bytes} ${units[at]}`;
}

export function ago(iso) {
  if (!iso) return "–";
  return `${duration((Date.now() - new Date(iso)) / 1000)} ago`;
}

export function duration(seconds) {
  seconds = Math.max(0, Math.round(seconds));
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export function when(iso) {
  return h("time", { datetime: iso, title: new Date(iso).toLocaleString() }, ago(iso));
}

/** Calls `action` once typing has paused. */
export function afterTyping(action, pause = 200) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => action(...given), pause); };
}

export function pause(milliseconds) {
  return new Promise((resolve) => { setTimeout(resolve, milliseconds); });
}

export async function copy(text) {
  await navigator.clipboard.writeText(text);
  notice("copied");
}

export function save(name, type, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

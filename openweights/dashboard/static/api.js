// What the page asks the server, with the header that only a page of this origin can send.

const HEADERS = { "x-openweights": "page" };

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

/** An object has the names that it was sent with, and no others: a measure may be called "constructor". */
const bare = (_, value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.setPrototypeOf(value, null) : value);

async function answer(response) {
  const body = await response.text().then((text) => JSON.parse(text, bare)).catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body.error || response.statusText);
  return body;
}

export async function get(path, query = {}, signal = undefined) {
  const given = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined));
  const address = given.size ? `${path}?${given}` : path;
  return answer(await fetch(address, { headers: HEADERS, signal }));
}

export async function post(path, body = {}) {
  const form = body instanceof FormData;
  return answer(await fetch(path, {
    method: "POST",
    headers: form ? HEADERS : { ...HEADERS, "content-type": "application/json" },
    body: form ? body : JSON.stringify(body),
  }));
}

export const job = (id) => `/api/jobs/${encodeURIComponent(id)}`;
export const file = (id) => `/api/files/${encodeURIComponent(id)}`;

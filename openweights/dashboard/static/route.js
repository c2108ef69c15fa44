// The address holds the whole view: `#/compare?jobs=a,b&x=step`.

export function current() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(decodeURIComponent);
  return { page: page || "jobs", id: rest.join("/"), query: Object.fromEntries(new URLSearchParams(query)) };
}

/** The address of a view. */
export function to(page, id = "", query = {}) {
  const given = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined));
  return `#/${page}${id ? `/${encodeURIComponent(id)}` : ""}${given.size ? `?${given}` : ""}`;
}

/** Changes the view's own part of the address, without leaving the view. */
export function remember(query) {
  const here = current();
  history.replaceState(null, "", to(here.page, here.id, { ...here.query, ...query }));
}

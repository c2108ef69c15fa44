// Charts with plotly, in the page's colours.

import { fill, save, svg } from "./dom.js";

// Okabe and Ito's, as in figures; their black is the colour of the page's text.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "--text"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

let plotly = null;

/** Loads the charts' library; early, while the numbers are read. */
export function library() {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/static/plotly.min.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("the charts' library could not be loaded"));
    document.head.append(script);
  });
  return plotly;
}

const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function colour(index) {
  const found = COLOURS[index % COLOURS.length];
  return found.startsWith("--") ? styled(found) : found;
}

/** Colour and dashes of a line, others for each of 32. */
export const look = (index) => ({ color: colour(index), dash: DASHES[Math.floor(index / COLOURS.length) % DASHES.length] });

function layout(given) {
  // Powers as they are written in code: 1e-4, not 100µ.
  const axis = { gridcolor: styled("--line"), zerolinecolor: styled("--line"), automargin: true, exponentformat: "e", hoverformat: ".5~g" };
  return {
    margin: { l: 50, r: 12, t: 8, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: styled("--text"), size: 12 },
    hovermode: "closest",
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", font: { size: 11 } },
    ...given,
    xaxis: { ...axis, ...given.xaxis },
    yaxis: { ...axis, ...given.yaxis },
  };
}

/** An axis of whole numbers over all of the traces; few of them do not repeat: 1 2 3, not 1 2 2 3 3. */
export function stepAxis(title, traces) {
  const xs = traces.flatMap(({ x }) => x).filter(Number.isFinite);
  const [low, high] = xs.reduce(([least, most], x) => [Math.min(least, x), Math.max(most, x)], [Infinity, -Infinity]);
  return { title: { text: title }, tickformat: ",", hoverformat: ",", ...(high > low ? { range: [low - 0.03 * (high - low), high + 0.03 * (high - low)] } : {}), ...(high >= low && high - low < 13 ? { dtick: 1 } : {}) };
}

/** Draws or redraws `traces` in `place`; what the user zoomed to stays. While the library loads, for
 * which a busy machine takes seconds, there are plain lines. */
export async function draw(place, traces, given = {}) {
  if (!window.Plotly) fill(place, preview(place, traces));
  const library_ = await library();
  place.querySelector(".preview")?.remove();
  await library_.react(place, traces, layout({ uirevision: "kept", ...given }), { responsive: true, displaylogo: false, displayModeBar: false });
}

function preview(place, traces) {
  const lines = traces.filter(({ type, mode }) => !type && mode?.startsWith("lines")).map((trace) => ({ ...trace, points: trace.x.map((x, at) => [Number(x), trace.y[at]]).filter(([x, y]) => y !== null && Number.isFinite(x)) }));
  const [xs, ys] = [0, 1].map((axis) => lines.flatMap(({ points }) => points.map((point) => point[axis])));
  const [width, height, edge] = [place.clientWidth || 600, place.clientHeight || 260, 40];
  const scale = (values, from, to) => {
    const [low, high] = values.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
    return (value) => (from + (to - from) * (value - low) / (high - low || 1)).toFixed(1);
  };
  const [x, y] = [scale(xs, edge, width - edge), scale(ys, height - edge, edge)];
  const path = ({ points, line }) => svg("path", { d: `M${points.map(([a, b]) => `${x(a)},${y(b)}`).join("L")}`, fill: "none", stroke: line?.color || colour(0), "stroke-width": line?.width ?? 2 });
  return svg("svg", { class: "preview", width: "100%", height: "100%", "aria-hidden": "true" }, ...lines.filter(({ points }) => points.length > 1).map(path));
}

/** The picture as a file; `format` is png or svg. */
export async function picture(place, name, format) {
  await (await library()).downloadImage(place, { format, filename: name, width: 1200, height: 700, scale: format === "png" ? 2 : 1 });
}

/** Rows of objects as a CSV file. */
export function csv(name, rows) {
  const columns = [...new Set(rows.flatMap(Object.keys))];
  const field = (value) => {
    const text = value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    // A leading sign that spreadsheets take for a formula is kept from being one.
    const safe = /^[=+@\t]/.test(text) ? `'${text}` : text;
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  save(name, "text/csv", [columns, ...rows.map((row) => columns.map((column) => row[column]))].map((row) => row.map(field).join(",")).join("\n"));
}

/** Exponential smoothing with its start corrected, as Adam's: the first value is the first point. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

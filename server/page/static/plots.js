// Small drawings: a curve over the last minutes, blocks of the KV cache as cells, a lane's past.

import { svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 70;
const CELLS = 480;
const COLUMNS = 80;

// points: [seconds, value], the newest last; words: what the curve is.
export function curve(points, spanS, words, format) {
  const most = Math.max(1e-9, ...points.map(([, value]) => value));
  const end = points.at(-1)?.[0] ?? 0;
  const x = (s) => WIDTH - ((end - s) / spanS) * WIDTH;
  const y = (value) => HEIGHT - 4 - (value / most) * (HEIGHT - 22);
  const line = points.map(([s, value], index) => `${index ? "L" : "M"}${x(s).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const label = points.length ? `${words}: ${format(points.at(-1)[1])} now, ${format(most)} at most` : `${words}: nothing yet`;
  const top = svg("text", { x: 2, y: 11 });
  top.textContent = points.length ? format(most) : "";
  return svg(
    "svg",
    { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 4, y2: HEIGHT - 4 }),
    svg("path", { d: line || "M0 0" }),
    top,
  );
}

const KINDS = ["free", "kept", "held", "shared"];

// states: a digit for each block, or for some of them; without it shares of all, as an engine that
// has no blocks of one size does not tell which is where.
export function blockMap({ held, kept, free }, states) {
  const total = held + kept + free;
  const num = states ? states.length : Math.min(CELLS, total);
  const cells = [];
  const size = WIDTH / COLUMNS;
  for (let index = 0; index < num; index += 1) {
    const at = ((index + 0.5) / num) * total;
    const kind = states ? KINDS[states[index]] : at < held ? "held" : at < held + kept ? "kept" : "free";
    const place = { x: (index % COLUMNS) * size, y: Math.floor(index / COLUMNS) * size };
    cells.push(svg("rect", { ...place, width: size - 0.8, height: size - 0.8, rx: 0.5, class: `k-${kind}` }));
  }
  const rows = Math.max(1, Math.ceil(num / COLUMNS));
  const label = `${held} blocks held by sequences, ${kept} kept for prompts that begin alike, ${free} free`;
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${rows * size}`, role: "img", "aria-label": label }, ...cells);
}

// past: [{state, from}], the last one until now; all in seconds.
export function strip(past, now, spanS) {
  const x = (s) => Math.max(0, WIDTH - ((now - s) / spanS) * WIDTH);
  const pieces = past.map(({ state, from }, index) => {
    const to = past[index + 1]?.from ?? now;
    return svg("rect", { x: x(from), y: 1, width: Math.max(to > from ? 1 : 0, x(to) - x(from)), height: 10, class: `k-${state}` });
  });
  return svg("svg", { viewBox: `0 0 ${WIDTH} 12`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...pieces);
}

// share and start: 0 to 1, of the whole width.
export function bar(share, start = 0) {
  const place = { x: start * WIDTH, y: 0, width: Math.min(share, 1 - start) * WIDTH, height: 10 };
  const ground = svg("rect", { x: 0, y: 0, width: WIDTH, height: 10, class: "k-free" });
  return svg("svg", { viewBox: `0 0 ${WIDTH} 10`, preserveAspectRatio: "none", "aria-hidden": "true" }, ground, svg("rect", { ...place, class: "k-held" }));
}

// points: [layer, value], from the first layer to the last; words: what a reader is told.
export function profile(points, words, format) {
  const most = Math.max(1e-9, ...points.map(([, value]) => value));
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const x = (layer) => 4 + ((layer - first) / Math.max(1, last - first)) * (WIDTH - 8);
  const y = (value) => HEIGHT - 18 - (value / most) * (HEIGHT - 36);
  const line = points.map(([layer, value], index) => `${index ? "L" : "M"}${x(layer).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const label = (text, place, anchor) => {
    const node = svg("text", { ...place, "text-anchor": anchor });
    node.textContent = text;
    return node;
  };
  return svg(
    "svg",
    { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words },
    svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 18, y2: HEIGHT - 18 }),
    svg("path", { d: line }),
    label(format(most), { x: 2, y: 11 }, "start"),
    label(`layer ${first}`, { x: 2, y: HEIGHT - 4 }, "start"),
    label(String(last), { x: WIDTH - 2, y: HEIGHT - 4 }, "end"),
  );
}

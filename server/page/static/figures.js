// Figures as people read them, and the cards and tables that they stand in.

import { el } from "./dom.js";

document.head.append(el("link", { rel: "stylesheet", href: "page/engine.css" }));

export const number = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
export const seconds = (value) => (value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`);
export const bytes = (value) => (value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${(value / 2 ** 20).toFixed(1)} MiB`);

export const card = (title, ...parts) => el("section", { class: "card" }, el("h2", {}, title), parts);

export function table(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("table", {}, el("tbody", {}, shown.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, String(value))))));
}

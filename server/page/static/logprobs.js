// An answer's tokens, coloured by their probability; what else could have stood there on hover or focus.

import { el } from "./dom.js";

const percent = (logprob) => `${(Math.exp(logprob) * 100).toPrecision(3)} %`;
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

// One stop of the Tab key: arrows go from token to token.
export function heatMap(tokens) {
  const tip = el("div", { class: "tip", role: "status", "aria-live": "polite" });
  const spans = tokens.map((token, index) => {
    const span = el(
      "span",
      {
        class: "token",
        role: "option",
        tabindex: index === 0 ? 0 : -1,
        "aria-label": `${visible(token.token)}, ${percent(token.logprob)}`,
        onmouseenter: () => tell(token, span),
        onfocus: () => tell(token, span),
      },
      token.token,
    );
    span.style.setProperty("--doubt", Math.min(1, -token.logprob / 4).toFixed(3));
    return span;
  });
  const map = el("div", { class: "tokens", role: "listbox", "aria-label": "tokens by probability", onkeydown: move }, spans);

  function tell(token, span) {
    const others = token.top.filter((one) => one.token !== token.token);
    const rows = [token, ...others].map((one) =>
      el("tr", {}, el("td", {}, el("code", {}, visible(one.token))), el("td", {}, percent(one.logprob))),
    );
    tip.replaceChildren(el("table", {}, el("tbody", {}, rows)));
    for (const each of map.querySelectorAll(".is-told")) each.classList.remove("is-told");
    span.classList.add("is-told");
  }

  function move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = spans.indexOf(document.activeElement);
    const next = spans[Math.max(0, Math.min(spans.length - 1, at + step))];
    spans[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  return el("div", { class: "heat" }, map, tip);
}

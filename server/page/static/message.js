// One message on the page: a user's, a tool's, or the answers of the model beside each other.

import { inWords } from "./answer.js";
import { button, copy, el } from "./dom.js";
import { heatMap } from "./logprobs.js";
import { show } from "./markdown.js";
import { LANGUAGES } from "./snippets.js";
import { chosen } from "./tree.js";

const ENDINGS = {
  length: "Cut here: max_tokens, or the context's end, was reached.",
  stopped: "Stopped.",
};

// One answer, drawn again as it grows.
class AnswerView {
  constructor(answer, heading) {
    this.reasoning = el("div", { class: "text" });
    this.thought = el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), this.reasoning);
    this.text = el("div", { class: "text" });
    this.calls = el("div", { class: "calls" });
    this.ending = el("p", { class: "ending", hidden: true });
    this.box = el("section", { class: "answer" }, heading, this.thought, this.text, this.calls, this.ending);
    this.update(answer);
  }

  update(answer, stopped = false) {
    this.thought.hidden = !answer.reasoning;
    if (answer.reasoning) show(this.reasoning, answer.reasoning);
    show(this.text, answer.text);
    this.calls.replaceChildren(...answer.calls.map(callBox));
    const ending = ENDINGS[answer.finish] ?? (stopped && !answer.finish ? ENDINGS.stopped : "");
    this.ending.textContent = ending;
    this.ending.hidden = !ending;
  }

  heat(answer, isOn) {
    this.text.hidden = isOn;
    this.map?.remove();
    this.map = isOn ? heatMap(answer.tokens) : null;
    if (isOn) this.text.after(this.map);
  }
}

function callBox({ name, text }) {
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // a call that is being written, or that no JSON came of, is shown as it is
  }
  return el("figure", { class: "call" }, el("figcaption", {}, "Calls ", el("code", {}, name)), el("pre", { tabindex: 0, role: "region", "aria-label": `arguments of ${name}` }, shown));
}

// actions: regenerate, turn, choose, edit, results, bodyOf, base; each of this node.
export class AssistantView {
  constructor(node, actions, branch) {
    this.node = node;
    const isOne = node.answers.length === 1;
    this.views = node.answers.map((answer, index) => new AnswerView(answer, isOne ? null : this.#heading(index, actions)));
    this.facts = el("p", { class: "facts" });
    this.fault = el("div", { class: "alert", role: "alert", hidden: true });
    this.tools = el("div", { class: "row actions" });
    this.box = el(
      "article",
      { class: "message assistant", "aria-label": "answer", "aria-busy": "false" },
      switcher(branch, actions.turn),
      el("div", { class: isOne ? "answers" : "answers several" }, this.views.map((view) => view.box)),
      this.fault,
      this.facts,
      this.tools,
    );
    this.actions = actions;
    this.update();
  }

  #heading(index, { choose }) {
    const id = `${this.node.id}-${index}`;
    const radio = el("input", { type: "radio", id, name: this.node.id, checked: index === this.node.chosen, onchange: () => choose(index) });
    return el("header", {}, radio, el("label", { for: id }, `Answer ${index + 1}, to go on with`));
  }

  // isLive: it is being written.
  update(isLive = false) {
    const { node } = this;
    this.box.setAttribute("aria-busy", isLive);
    this.views.forEach((view, index) => view.update(node.answers[index], node.facts.stopped));
    if (isLive) return;
    const { error, requestId, notes = [] } = node.facts;
    this.fault.hidden = !error;
    this.fault.replaceChildren(...(error ? [el("p", {}, error), requestId ? el("p", { class: "id" }, "Request ", el("code", {}, requestId)) : ""] : []));
    const words = [...inWords(node.facts, node.answers.length), ...notes];
    this.facts.replaceChildren(words.join(" · "), requestId && !error ? el("span", { class: "id" }, " · request ", el("code", {}, requestId)) : "");
    this.tools.replaceChildren(...this.#buttons());
  }

  #buttons() {
    const { node, actions } = this;
    const made = [button("Copy", () => copy(chosen(node).text, "Answer"), { "aria-label": "Copy answer" })];
    if (actions.regenerate) made.push(button(node.facts.error ? "Try again" : "Regenerate", actions.regenerate));
    if (node.answers.some((answer) => answer.tokens.length)) {
      const toggle = button("Probabilities", () => {
        const isOn = toggle.getAttribute("aria-pressed") !== "true";
        toggle.setAttribute("aria-pressed", isOn);
        this.views.forEach((view, index) => view.heat(node.answers[index], isOn));
      }, { "aria-pressed": "false" });
      made.push(toggle);
    }
    return [...made, copyAs(() => actions.bodyOf(node), actions.base)];
  }
}

export function copyAs(bodyOf, base) {
  const menu = el("details", { class: "menu" }, el("summary", {}, "Copy as"));
  const buttons = Object.entries(LANGUAGES).map(([name, write]) =>
    button(name, () => {
      menu.open = false;
      copy(write(bodyOf(), base), name);
    }),
  );
  menu.append(el("div", {}, buttons));
  return menu;
}

function switcher({ index, count }, turn) {
  if (count < 2) return null;
  return el("nav", { class: "branches", "aria-label": "branches" }, button("‹", () => turn(-1), { "aria-label": "previous branch" }), ` ${index + 1} / ${count} `, button("›", () => turn(1), { "aria-label": "next branch" }));
}

export function userBox(node, { edit, turn }, branch) {
  const text = el("div", { class: "text plain" }, node.content);
  const box = el("article", { class: "message user", "aria-label": "you" }, switcher(branch, turn), text);
  const begin = () => {
    const area = el("textarea", { value: node.content, rows: Math.min(12, node.content.split("\n").length + 1), "aria-label": "Edit message" });
    const end = () => (editor.replaceWith(text), tools.hidden = false);
    const editor = el("form", { onsubmit: (event) => (event.preventDefault(), edit(area.value)) }, area, el("div", { class: "row" }, el("button", { type: "submit" }, "Send as a new branch"), button("Cancel", end)));
    tools.hidden = true;
    text.replaceWith(editor);
    area.focus();
  };
  const tools = el("div", { class: "row actions" }, button("Edit", begin), button("Copy", () => copy(node.content, "Message"), { "aria-label": "Copy message" }));
  box.append(tools);
  return box;
}

export function toolBox(node, name) {
  return el("article", { class: "message tool", "aria-label": "result of a tool" }, el("figure", { class: "call" }, el("figcaption", {}, "Result of ", el("code", {}, name)), el("pre", { tabindex: 0, role: "region", "aria-label": "result" }, node.content)));
}

// What the tools gave, for calls that nobody has answered yet. send(texts).
export function resultsForm(calls, send) {
  const areas = calls.map(({ name }) => el("textarea", { rows: 2, "aria-label": `Result of ${name}` }));
  const fields = calls.map(({ name }, index) => el("label", {}, "Result of ", el("code", {}, name), areas[index]));
  return el("form", { class: "results", onsubmit: (event) => (event.preventDefault(), send(areas.map((area) => area.value))) }, fields, el("button", { type: "submit" }, "Send results"));
}

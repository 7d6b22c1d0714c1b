// The settings of a conversation: system prompt, sampling fields, the form of the answer, tools.

import { button, el } from "./dom.js";
import { fieldRow } from "./fields.js";
import { schemaFault, toolNames, toolsFault } from "./request.js";

const FORMATS = [["text", "text"], ["json_object", "a JSON object"], ["json_schema", "JSON that follows a schema"]];
const SCHEMA = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
const TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

export class SettingsPanel {
  // fields: of the server. changed(): called after each change of the settings that are shown.
  constructor(container, fields, changed) {
    this.container = container;
    this.fields = fields;
    this.changed = changed;
    this.rows = [];
  }

  show(settings) {
    this.settings = settings;
    settings.params ??= {};
    this.rows = this.fields.map((field) =>
      fieldRow(field, settings.params[field.name], (value) => {
        if (value === undefined) delete settings.params[field.name];
        else settings.params[field.name] = value;
        this.changed();
      }),
    );
    const of = (isMain) => this.rows.filter((_, index) => this.fields[index].main === isMain).map(({ row }) => row);
    const reset = button("All to their defaults", () => {
      settings.params = {};
      this.show(settings);
      this.changed();
    });
    this.container.replaceChildren(
      this.#system(),
      el("section", {}, el("h3", {}, "Sampling"), of(true), el("details", {}, el("summary", {}, "More fields"), of(false)), reset),
      this.#format(),
      this.#tools(),
    );
  }

  // Shows what is wrong, and whether nothing is.
  check() {
    const wrong = this.container.querySelector('[aria-invalid="true"]');
    if (!wrong) return true;
    this.#reveal(wrong);
    return false;
  }

  // What the server refused, at its field; whether that is one of these.
  tell(param, words) {
    const name = /^\w+/.exec(param ?? "")?.[0];
    const row = this.rows.find((one) => one.name === name);
    if (!row) return false;
    row.tell(words);
    this.#reveal(row.control);
    return true;
  }

  #reveal(control) {
    for (let at = control; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    document.body.classList.add("shows-settings");
    control.focus();
  }

  #system() {
    const text = el("textarea", { id: "system", rows: 3, value: this.settings.system ?? "", "aria-describedby": "system-about" });
    text.addEventListener("input", () => {
      this.settings.system = text.value;
      this.changed();
    });
    const about = el("p", { class: "about", id: "system-about" }, "What the model is told before the conversation.");
    return el("section", {}, el("h3", {}, el("label", { for: "system" }, "System prompt")), text, about);
  }

  #format() {
    const { settings } = this;
    const editor = jsonEditor("schema", "JSON schema", settings.schema ?? "", SCHEMA, (text) =>
      settings.format === "json_schema" ? schemaFault(text) : "", (text) => {
      settings.schema = text;
      this.changed();
    });
    const choice = el("select", { id: "format" }, FORMATS.map(([value, words]) => el("option", { value, selected: value === settings.format }, words)));
    choice.addEventListener("input", () => {
      settings.format = choice.value;
      editor.box.hidden = choice.value !== "json_schema";
      editor.check();
      this.changed();
    });
    editor.box.hidden = settings.format !== "json_schema";
    return el("section", {}, el("h3", {}, el("label", { for: "format" }, "The answer is")), choice, editor.box);
  }

  #tools() {
    const { settings } = this;
    const choice = el("select", { id: "tool-choice" });
    const fill = () => {
      const names = toolNames(settings.tools ?? "");
      const options = [["", "default"], ["auto", "auto: the model decides"], ["none", "none"], ["required", "required: one at least"], ...names.map((name) => [name, `call ${name}`])];
      if (!options.some(([value]) => value === settings.toolChoice)) settings.toolChoice = "";
      choice.replaceChildren(...options.map(([value, words]) => el("option", { value, selected: value === settings.toolChoice }, words)));
    };
    fill();
    choice.addEventListener("input", () => {
      settings.toolChoice = choice.value;
      this.changed();
    });
    const editor = jsonEditor("tools", "Tools", settings.tools ?? "", TOOLS, toolsFault, (text) => {
      settings.tools = text;
      fill();
      this.changed();
    });
    return el("section", {}, el("h3", {}, "Tools"), editor.box, el("div", { class: "field" }, el("label", { for: "tool-choice" }, "tool_choice"), choice));
  }
}

// fault(text): "" or what is wrong.
function jsonEditor(id, label, text, example, fault, changed) {
  const area = el("textarea", { id, class: "json", rows: 8, value: text, spellcheck: "false", "aria-label": label, "aria-describedby": `${id}-fault` });
  const told = el("p", { class: "fault", id: `${id}-fault`, role: "status" });
  const check = () => {
    told.textContent = fault(area.value);
    area.setAttribute("aria-invalid", Boolean(told.textContent));
  };
  const put = (value) => {
    area.value = value;
    check();
    changed(value);
  };
  area.addEventListener("input", () => put(area.value));
  const tidy = button("Tidy", () => {
    if (area.value.trim() && !told.textContent) put(JSON.stringify(JSON.parse(area.value), null, 2));
  });
  const box = el("div", { class: "editor" }, area, told, el("div", { class: "row" }, button("Example", () => put(JSON.stringify(example, null, 2))), tidy, button("Clear", () => put(""))));
  check();
  return { box, check };
}

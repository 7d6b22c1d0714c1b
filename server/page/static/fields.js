// The form of one field of a request, made of what the server says that it validates.

import { el } from "./dom.js";

const WIDEST_SLIDER = 10;

// What may be given, in words: "0 to 2, default 1".
export function rangeOf(field) {
  const low = field.minimum ?? field.exclusiveMinimum;
  const high = field.maximum ?? field.exclusiveMaximum;
  const words = [];
  if (low !== undefined && high !== undefined) {
    const from = field.exclusiveMinimum === undefined ? `${low}` : `above ${low}`;
    const to = field.exclusiveMaximum === undefined ? `to ${high}` : `to below ${high}`;
    words.push(`${from} ${to}`);
  }
  if (field.most) words.push(`up to ${field.most}, one on each line, \\n is a line break`);
  const { default: given } = field;
  if (given !== null && given !== undefined) words.push(`default ${given === true ? "on" : given === false ? "off" : given}`);
  return words.join(", ");
}

// The value that a text stands for, undefined for none; an Error in words where it is no such value.
export function valueOf(field, text) {
  if (field.kind === "list") {
    const lines = text.split("\n").filter((line) => line !== "");
    if (lines.length > field.most) throw new Error(`${lines.length} lines; wanted at most ${field.most}`);
    const plain = lines.map((line) => line.replace(/\\(n|t|\\)/g, (_, char) => ({ n: "\n", t: "\t", "\\": "\\" })[char]));
    return plain.length ? plain : undefined;
  }
  if (text.trim() === "") return undefined;
  if (field.kind === "boolean") return text === "true";
  if (field.kind === "string") return text;
  const value = Number(text);
  const isKind = Number.isFinite(value) && (field.kind === "number" || Number.isInteger(value));
  const isWithin =
    value >= (field.minimum ?? -Infinity) &&
    value <= (field.maximum ?? Infinity) &&
    value > (field.exclusiveMinimum ?? -Infinity) &&
    value < (field.exclusiveMaximum ?? Infinity);
  if (!isKind || !isWithin) throw new Error(`wanted ${field.kind === "integer" ? "a whole number" : "a number"}, ${rangeOf(field)}`);
  return value;
}

function textOf(field, value) {
  if (value === undefined || value === null) return "";
  if (field.kind === "list")
    return value.map((line) => line.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t")).join("\n");
  return String(value);
}

// changed(value): called with undefined for the default. fault: of the field, as the server told it.
export function fieldRow(field, value, changed) {
  const id = `field-${field.name}`;
  const fault = el("p", { class: "fault", id: `${id}-fault`, hidden: true });
  const described = { id, "aria-describedby": `${id}-about ${id}-fault` };
  const control = controlOf(field, textOf(field, value), described);
  const slider = sliderOf(field, control, value);
  control.addEventListener("input", take);
  function take() {
    try {
      const found = valueOf(field, control.value);
      tell("");
      if (slider) slider.value = found ?? field.default ?? 0;
      changed(found);
    } catch (error) {
      tell(error.message);
    }
  }
  function tell(words) {
    fault.textContent = words;
    fault.hidden = !words;
    control.setAttribute("aria-invalid", Boolean(words));
  }
  slider?.addEventListener("input", () => {
    control.value = slider.value;
    take();
  });
  const row = el(
    "div",
    { class: "field" },
    el("label", { for: id }, field.name),
    slider,
    control,
    el("p", { class: "about", id: `${id}-about` }, field.about, " ", el("span", { class: "range" }, rangeOf(field))),
    fault,
  );
  return { row, control, tell, name: field.name };
}

function controlOf(field, text, described) {
  const options = field.kind === "boolean" ? [["true", "on"], ["false", "off"]] : field.enum?.map((one) => [one, one]);
  if (options) {
    const choices = [["", "default"], ...options].map(([value, words]) => el("option", { value, selected: value === text }, words));
    return el("select", described, choices);
  }
  if (field.kind === "list") return el("textarea", { ...described, rows: 2, value: text, spellcheck: "false" });
  const isNumber = field.kind !== "string";
  return el("input", { ...described, type: "text", inputmode: isNumber ? "decimal" : null, value: text, autocomplete: "off", placeholder: field.default ?? "" });
}

function sliderOf(field, control, value) {
  const low = field.minimum ?? field.exclusiveMinimum;
  if (!["number", "integer"].includes(field.kind) || !(field.maximum - low <= WIDEST_SLIDER)) return null;
  const step = field.kind === "integer" ? 1 : 0.01;
  const min = field.exclusiveMinimum === undefined ? low : low + step;
  const slider = el("input", { type: "range", min, max: field.maximum, step, "aria-label": `${field.name}, slider` });
  slider.value = value ?? field.default ?? low;
  return slider;
}

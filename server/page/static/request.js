// A conversation and its settings -> the body of a request; what is wrong of them, in words.

import { messages } from "./tree.js";

const NAME = /^[a-zA-Z0-9_.-]{1,64}$/;
const TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"];
const MOST_TOOLS = 128;

export function bodyOf(conversation, upTo, model) {
  const { params = {}, format, schema = "", tools = "", toolChoice = "" } = conversation.settings;
  const body = { model, messages: messages(conversation, upTo), ...params };
  if (format === "json_object") body.response_format = { type: "json_object" };
  if (format === "json_schema")
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  if (tools.trim()) {
    body.tools = JSON.parse(tools);
    if (["none", "auto", "required"].includes(toolChoice)) body.tool_choice = toolChoice;
    else if (toolChoice) body.tool_choice = { type: "function", function: { name: toolChoice } };
  }
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

// "" where the text is a schema that can be asked for.
export function schemaFault(text) {
  if (!text.trim()) return "A JSON schema is wanted here.";
  const { value, fault } = parsed(text);
  return fault ?? formFault(value, "the schema") ?? "";
}

export function toolsFault(text) {
  if (!text.trim()) return "";
  const { value, fault } = parsed(text);
  if (fault) return fault;
  if (!Array.isArray(value)) return 'Wanted a list: [{"type": "function", "function": {"name": ...}}]';
  if (value.length > MOST_TOOLS) return `${value.length} tools; at most ${MOST_TOOLS} can be given.`;
  const names = new Set();
  for (const [index, tool] of value.entries()) {
    const where = `tools[${index}]`;
    if (tool?.type !== "function") return `${where}.type: wanted "function"`;
    const { name, parameters } = tool.function ?? {};
    if (!NAME.test(name ?? "")) return `${where}.function.name: wanted 1 to 64 letters, digits, _ . -`;
    if (names.has(name)) return `${where}.function.name: "${name}" stands twice`;
    names.add(name);
    const wrong = parameters === undefined ? null : formFault(parameters, `${where}.function.parameters`);
    if (wrong) return wrong;
  }
  return "";
}

export function toolNames(text) {
  return toolsFault(text) || !text.trim() ? [] : JSON.parse(text).map((tool) => tool.function.name);
}

function parsed(text) {
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    const at = /position (\d+)/.exec(error.message);
    const before = at ? text.slice(0, Number(at[1])).split("\n") : null;
    const where = before ? ` (line ${before.length}, column ${before.at(-1).length + 1})` : "";
    return { fault: `No JSON${where}: ${error.message}` };
  }
}

function formFault(schema, where) {
  if (typeof schema === "boolean") return where.includes(".") ? null : `${where}: wanted an object`;
  if (schema === null || typeof schema !== "object" || Array.isArray(schema)) return `${where}: wanted an object`;
  const types = schema.type === undefined ? [] : [schema.type].flat();
  const unknown = types.find((type) => !TYPES.includes(type));
  if (unknown !== undefined) return `${where}.type: ${JSON.stringify(unknown)} is none of ${TYPES.join(", ")}`;
  if (schema.enum !== undefined && !(Array.isArray(schema.enum) && schema.enum.length))
    return `${where}.enum: wanted a list of values`;
  const { required, properties } = schema;
  if (required !== undefined && !(Array.isArray(required) && required.every((one) => typeof one === "string")))
    return `${where}.required: wanted a list of names`;
  if (properties !== undefined && (properties === null || typeof properties !== "object" || Array.isArray(properties)))
    return `${where}.properties: wanted an object`;
  const inner = Object.entries(properties ?? {}).map(([name, form]) => [form, `${where}.properties.${name}`]);
  if (schema.items !== undefined) inner.push([schema.items, `${where}.items`]);
  for (const name of ["anyOf", "oneOf", "allOf"]) {
    if (schema[name] === undefined) continue;
    if (!Array.isArray(schema[name])) return `${where}.${name}: wanted a list of schemas`;
    inner.push(...schema[name].map((form, index) => [form, `${where}.${name}[${index}]`]));
  }
  for (const [form, place] of inner) {
    const fault = formFault(form, place);
    if (fault) return fault;
  }
  return null;
}

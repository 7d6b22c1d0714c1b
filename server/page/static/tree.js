// A conversation is a tree of messages: editing or asking again adds a branch beside the old one, and
// every node knows which of its branches is looked at. Plain values; knows no page and no server.

const ROOT = "root";
let count = 0;

export const newId = () => `${Date.now().toString(36)}-${(count++).toString(36)}-${Math.random().toString(36).slice(2, 8)}`;

export function newConversation(settings = {}) {
  return {
    id: newId(),
    title: "",
    changed: Date.now(),
    settings,
    nodes: { [ROOT]: { id: ROOT, parent: null, children: [], selected: 0 } },
  };
}

export function add(conversation, parentId, fields) {
  const node = { id: newId(), parent: parentId, children: [], selected: 0, ...fields };
  const parent = conversation.nodes[parentId];
  parent.selected = parent.children.push(node.id) - 1;
  conversation.nodes[node.id] = node;
  conversation.changed = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = node.content.trim().slice(0, 80);
  return node;
}

// From the first message to the last that is looked at.
export function path(conversation) {
  const found = [];
  let node = conversation.nodes[ROOT];
  while (node.children.length) {
    node = conversation.nodes[node.children[node.selected]];
    found.push(node);
  }
  return found;
}

export const lastId = (conversation) => path(conversation).at(-1)?.id ?? ROOT;

export function branches(conversation, node) {
  const parent = conversation.nodes[node.parent];
  return { index: parent.selected, count: parent.children.length };
}

export function turn(conversation, node, step) {
  const parent = conversation.nodes[node.parent];
  const { length } = parent.children;
  parent.selected = (parent.selected + step + length) % length;
}

export const chosen = (node) => node.answers[node.chosen];

// What the API is told of the messages up to a node, that one included.
export function messages(conversation, upTo) {
  const system = conversation.settings.system?.trim();
  const told = system ? [{ role: "system", content: system }] : [];
  const nodes = [];
  for (let id = upTo; id !== ROOT; id = conversation.nodes[id].parent) nodes.unshift(conversation.nodes[id]);
  for (const node of nodes) {
    if (node.role === "user") told.push({ role: "user", content: node.content });
    if (node.role === "tool")
      told.push({ role: "tool", tool_call_id: node.callId, content: node.content });
    if (node.role === "assistant") told.push(assistant(chosen(node)));
  }
  return told;
}

function assistant(answer) {
  const calls = answer.calls.map(({ id, name, text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  return {
    role: "assistant",
    content: answer.text,
    ...(calls.length ? { tool_calls: calls } : {}),
  };
}

// Of a value that may come from anywhere: a conversation with known fields alone, or null.
export function read(value) {
  const nodes = {};
  for (const [id, node] of Object.entries(value?.nodes ?? {})) {
    if (id !== ROOT && !["user", "assistant", "tool"].includes(node?.role)) return null;
    nodes[id] = { id, parent: null, children: strings(node.children), selected: whole(node.selected) };
    if (id === ROOT) continue;
    nodes[id].role = node.role;
    if (node.role !== "assistant") nodes[id].content = text(node.content);
    if (node.role === "tool") nodes[id].callId = text(node.callId);
    if (node.role === "assistant") {
      nodes[id].answers = list(node.answers).map(readAnswer);
      nodes[id].chosen = whole(node.chosen);
      nodes[id].facts = readFacts(node.facts);
      if (!nodes[id].answers[nodes[id].chosen]) return null;
    }
  }
  if (!nodes[ROOT] || !joined(nodes)) return null;
  const settings = readSettings(value.settings);
  const changed = whole(value.changed) || Date.now();
  return { id: text(value.id) || newId(), title: text(value.title), changed, settings, nodes };
}

// Sets each node's parent; whether they are one tree.
function joined(nodes) {
  const seen = new Set([ROOT]);
  const waiting = [ROOT];
  while (waiting.length) {
    const node = nodes[waiting.pop()];
    if (node.children.length && node.selected >= node.children.length) node.selected = 0;
    for (const id of node.children) {
      if (!(id in nodes) || seen.has(id)) return false;
      seen.add(id);
      nodes[id].parent = node.id;
      waiting.push(id);
    }
  }
  return seen.size === Object.keys(nodes).length;
}

function readSettings(value) {
  const plain = (one) => ["number", "boolean", "string"].includes(typeof one) || Array.isArray(one);
  const params = Object.fromEntries(Object.entries(value?.params ?? {}).filter(([name, one]) => plain(one) && name !== "messages"));
  const texts = ["system", "format", "schema", "tools", "toolChoice"].map((name) => [name, text(value?.[name])]);
  return { ...Object.fromEntries(texts), params };
}

function readFacts(value) {
  const facts = {};
  for (const name of ["begun", "first", "last", "promptTokens", "tokens", "cost"])
    if (typeof value?.[name] === "number") facts[name] = value[name];
  for (const name of ["error", "requestId", "model"]) if (text(value?.[name])) facts[name] = value[name];
  facts.stopped = value?.stopped === true;
  facts.notes = strings(value?.notes);
  if (value?.asked && typeof value.asked === "object") facts.asked = { ...value.asked };
  return facts;
}

function readAnswer(value) {
  const calls = list(value?.calls).map((call) => ({
    id: text(call?.id),
    name: text(call?.name),
    text: text(call?.text),
  }));
  const { text: said, reasoning, finish } = value ?? {};
  return { text: text(said), reasoning: text(reasoning), calls, tokens: list(value?.tokens).map(readToken), finish: text(finish) };
}

const readToken = (value) => ({
  token: text(value?.token),
  logprob: Number(value?.logprob) || 0,
  top: list(value?.top).map((one) => ({ token: text(one?.token), logprob: Number(one?.logprob) || 0 })),
});

const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);
const strings = (value) => list(value).filter((one) => typeof one === "string");
const whole = (value) => (Number.isInteger(value) && value >= 0 ? value : 0);

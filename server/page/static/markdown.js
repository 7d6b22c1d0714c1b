// Markdown -> nodes, block by block. `show` redraws only the blocks that have changed, so a stream
// stays cheap and what is selected stays selected.
// Source: CommonMark 0.31 and GitHub's tables and tasks, as far as models write them.

import { codeBlock } from "./code.js";
import { el } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const TABLE_LINE = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const DEEPEST = 8;

const shown = new WeakMap();

export function show(container, text) {
  const before = shown.get(container) ?? [];
  const blocks = split(text);
  const sources = blocks.map((block) => block.lines.join("\n") + block.kind);
  let same = 0;
  while (same < before.length && before[same] === sources[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => render(block, 0)));
  shown.set(container, sources);
}

// The blocks of the outermost level, each with its lines.
function split(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at);
    const end = ENDS[kind](lines, at);
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (/^ {0,3}>/.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-"))
    return "table";
  return "paragraph";
}

const one = (lines, at) => at + 1;

function whileLine(test) {
  return (lines, at) => {
    let end = at + 1;
    while (end < lines.length && test(lines, end)) end += 1;
    return end;
  };
}

const ENDS = {
  heading: one,
  rule: one,
  fence(lines, at) {
    const mark = FENCE.exec(lines[at])[1];
    const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},} *$`);
    let end = at + 1;
    while (end < lines.length && !close.test(lines[end])) end += 1;
    return Math.min(end + 1, lines.length);
  },
  quote: whileLine((lines, at) => lines[at].trim() && /^ {0,3}>/.test(lines[at])),
  table: whileLine((lines, at) => lines[at].includes("|")),
  paragraph: whileLine(
    (lines, at) => lines[at].trim() && ["paragraph", "table"].includes(kindOf(lines, at)),
  ),
  list: whileLine((lines, at) => {
    if (ITEM.test(lines[at])) return !RULE.test(lines[at]);
    if (/^ {2,}\S/.test(lines[at])) return true;
    if (lines[at].trim()) return lines[at - 1].trim() && kindOf(lines, at) === "paragraph";
    return /^ {2,}\S/.test(lines[at + 1] ?? "") || ITEM.test(lines[at + 1] ?? "");
  }),
};

function render(block, depth) {
  return RENDERERS[block.kind](block.lines, depth);
}

function inner(lines, depth) {
  if (depth >= DEEPEST) return [lines.join("\n")];
  return split(lines.join("\n")).map((block) => render(block, depth + 1));
}

const RENDERERS = {
  paragraph: (lines) => el("p", {}, inline(lines.map((line) => line.trimStart()).join("\n"))),
  heading(lines) {
    const [, marks, text] = HEADING.exec(lines[0]);
    // The page has its own first and second level.
    return el(`h${Math.min(6, marks.length + 2)}`, {}, inline(text));
  },
  rule: () => el("hr"),
  fence(lines) {
    const [, mark, language] = FENCE.exec(lines[0]);
    const isClosed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
    return codeBlock(lines.slice(1, isClosed ? -1 : undefined).join("\n"), language);
  },
  quote: (lines, depth) =>
    el("blockquote", {}, inner(lines.map((line) => line.replace(/^ {0,3}> ?/, "")), depth)),
  table(lines) {
    const [head, , ...rows] = lines.map(cells);
    const row = (name, texts) => el("tr", {}, texts.map((text) => el(name, {}, inline(text))));
    const body = el("tbody", {}, rows.map((texts) => row("td", texts)));
    const table = el("table", {}, el("thead", {}, row("th", head)), body);
    return el("div", { class: "scrolls", tabindex: 0, role: "region", "aria-label": "table" }, table);
  },
  list(lines, depth) {
    const first = ITEM.exec(lines[0]);
    const isOrdered = /\d/.test(first[2]);
    const items = [];
    for (const line of lines) {
      const item = ITEM.exec(line);
      const isOwn = item && item[1].length <= first[1].length + 1;
      if (isOwn) items.push({ indent: item[0].length - item[4].length, lines: [item[4]] });
      else items.at(-1).lines.push(line.replace(new RegExp(`^ {0,${items.at(-1).indent}}`), ""));
    }
    const start = isOrdered && parseInt(first[2], 10) !== 1 ? parseInt(first[2], 10) : null;
    return el(isOrdered ? "ol" : "ul", { start }, items.map((item) => listItem(item.lines, depth)));
  },
};

function listItem(lines, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const texts = task ? [lines[0].slice(4), ...lines.slice(1)] : lines;
  const nodes = inner(texts, depth);
  const isTight = nodes.length && nodes[0].tagName === "P";
  const own = isTight ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
  const mark = task ? (task[1] === " " ? "☐ " : "☑ ") : null;
  return el("li", { class: task ? "task" : null }, mark, own);
}

function cells(line) {
  const text = line.trim().replace(/^\||(?<!\\)\|$/g, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// Markdown within a paragraph -> nodes: code, emphasis, links. HTML stays text; no image is loaded.

import { el } from "./dom.js";

const SAFE = /^(https?:\/\/|mailto:)/i;
const BARE = /^https?:\/\/[^\s<>"'`]+[^\s<>"'`.,;:!?)\]}*_]/i;
const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const WORD = /[\p{L}\p{N}]/u;
const DEEPEST = 12;
const FARTHEST = 2000; // characters that are slanted or bold together

export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const [node, end] = depth < DEEPEST ? special(text, at, depth) : [null, 0];
    if (node === null) {
      plain += text[at];
      at += 1;
    } else if (typeof node === "string") {
      plain += node;
      at = end;
    } else {
      put(node);
      at = end;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

// What begins here, and where it ends; [null] where nothing does.
function special(text, at, depth) {
  const char = text[at];
  if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return [text[at + 1], at + 2];
  if (char === "\n") return / {2}$/.test(text.slice(at - 2, at)) ? [el("br"), at + 1] : ["\n", at + 1];
  if (char === "`") return code(text, at);
  if (char === "!" && text[at + 1] === "[") return image(text, at, depth);
  if (char === "[") return link(text, at, depth);
  if (char === "<" || char === "h") return bare(text, at);
  if ("*_~".includes(char)) return emphasis(text, at, depth);
  return [null];
}

function code(text, at) {
  const fence = /^`+/.exec(text.slice(at))[0];
  let end = text.indexOf(fence, at + fence.length);
  while (end >= 0 && (text[end - 1] === "`" || text[end + fence.length] === "`"))
    end = text.indexOf(fence, end + 1);
  if (end < 0) return [fence, at + fence.length];
  const inner = text.slice(at + fence.length, end).replace(/\n/g, " ");
  const bare = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
  return [el("code", {}, bare), end + fence.length];
}

function target(text, at) {
  const found = /^\[((?:[^[\]\\]|\\.|\[[^\]]*\])*)\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+["'(][^)]*["')])?\s*\)/.exec(
    text.slice(at, at + 4096),
  );
  return found && { words: found[1], url: found[2], end: at + found[0].length };
}

function link(text, at, depth) {
  const found = target(text, at);
  if (!found) return [null];
  const words = inline(found.words, depth + 1);
  return [SAFE.test(found.url) ? anchor(found.url, words) : el("span", {}, words), found.end];
}

// An image would be a request to elsewhere: it is a link to it.
function image(text, at) {
  const found = target(text, at + 1);
  if (!found) return [null];
  const words = `image: ${found.words || found.url}`;
  return [SAFE.test(found.url) ? anchor(found.url, [words]) : el("span", {}, words), found.end];
}

function bare(text, at) {
  const from = text[at] === "<" ? at + 1 : at;
  const found = BARE.exec(text.slice(from, from + 2048));
  if (!found || (from === at && WORD.test(text[at - 1] ?? " "))) return [null];
  const end = from + found[0].length;
  if (from > at && text[end] !== ">") return [null];
  return [anchor(found[0], [found[0]]), end + (from - at)];
}

function anchor(href, words) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, words);
}

function emphasis(text, at, depth) {
  for (const [mark, name] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const from = at + mark.length;
    if (!/\S/.test(text[from] ?? " ")) continue;
    if (mark[0] === "_" && WORD.test(text[at - 1] ?? " ")) continue;
    const end = closing(text, from, mark);
    if (end < 0) continue;
    return [el(name, {}, inline(text.slice(from, end), depth + 1)), end + mark.length];
  }
  return [null];
}

function closing(text, from, mark) {
  const near = text.slice(0, from + FARTHEST);
  for (let end = near.indexOf(mark, from + 1); end >= 0; end = near.indexOf(mark, end + 1)) {
    if (mark.length === 2 && text[end + 2] === mark[0]) continue; // its last two are the mark
    const isLonger = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    const inWord = mark[0] === "_" && WORD.test(text[end + mark.length] ?? " ");
    if (/\S/.test(text[end - 1]) && text[end - 1] !== "\\" && !isLonger && !inWord) return end;
  }
  return -1;
}

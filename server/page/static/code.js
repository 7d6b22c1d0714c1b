// Code as spans of a kind: comments, strings, numbers, words that a language keeps to itself.

import { button, copy, el } from "./dom.js";

const C_WORDS =
  "auto bool break case catch char class const constexpr continue default delete do double else enum " +
  "explicit extern final float for friend goto if inline int long namespace new noexcept nullptr " +
  "operator override private protected public return short signed sizeof static struct switch " +
  "template this throw true false try typedef typename union unsigned using virtual void volatile while";
const WORDS = {
  c: C_WORDS,
  java: `${C_WORDS} abstract boolean byte extends implements import instanceof interface package super synchronized throws null var record`,
  js: "async await break case catch class const continue debugger default delete do else export extends false finally for from function if import in instanceof interface let new null of return static super switch this throw true try type typeof undefined var void while yield enum implements readonly",
  python:
    "False None True and as assert async await break class continue def del elif else except finally for from global if import in is lambda match case nonlocal not or pass raise return self try while with yield",
  rust: "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while",
  go: "break case chan const continue default defer else fallthrough for func go goto if import interface map nil package range return select struct switch true false type var",
  sql: "select from where and or not insert into values update set delete create table drop alter join left right inner outer on group by order having limit as null is in distinct union all primary key",
  bash: "if then else elif fi for while do done case esac in function return export local echo cd set source",
  json: "true false null",
  yaml: "true false null yes no",
};
const NAMES = {
  javascript: "js", jsx: "js", ts: "js", typescript: "js", tsx: "js", mjs: "js",
  py: "python", python3: "python", "c++": "c", cpp: "c", h: "c", cuda: "c", cs: "java", csharp: "java",
  kotlin: "java", rs: "rust", golang: "go", sh: "bash", shell: "bash", zsh: "bash", console: "bash",
  yml: "yaml", toml: "yaml", jsonc: "json",
};
const HASH = new Set(["python", "bash", "yaml"]);
const MOST = 50_000; // characters that are coloured

function lexer(language) {
  const comments = HASH.has(language)
    ? "(?<![^\\s])#[^\\n]*"
    : language === "sql"
      ? "--[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)"
      : "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)";
  const long = language === "python" ? "\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|" : "";
  const template = language === "js" || language === "go" ? "|`(?:[^`\\\\]|\\\\[\\s\\S])*(?:`|$)" : "";
  const strings = `${long}"(?:[^"\\\\\\n]|\\\\.)*"?${language === "rust" ? "" : "|'(?:[^'\\\\\\n]|\\\\.)*'?"}${template}`;
  return new RegExp(
    `(?<comment>${comments})|(?<string>${strings})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_$][\\w$]*)`,
    "g",
  );
}

function coloured(text, name) {
  const language = NAMES[name] ?? name;
  if (!(language in WORDS) || text.length > MOST) return [text];
  const words = new Set(WORDS[language].split(" "));
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(lexer(language))) {
    const { comment, string, number, word } = found.groups;
    const isKept = word && words.has(language === "sql" ? word.toLowerCase() : word);
    const isCalled = word && !isKept && text[found.index + word.length] === "(";
    const kind = comment ? "comment" : string ? "string" : number ? "number" : isKept ? "keyword" : isCalled ? "call" : null;
    if (!kind) continue;
    nodes.push(text.slice(at, found.index), el("span", { class: `t-${kind}` }, found[0]));
    at = found.index + found[0].length;
  }
  return [...nodes, text.slice(at)];
}

export function codeBlock(text, language = "") {
  const name = language.toLowerCase().slice(0, 30);
  const label = name ? `code, ${name}` : "code";
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, name || "text"), button("Copy", () => copy(text, "Code"))),
    el("pre", { tabindex: 0, role: "region", "aria-label": label }, el("code", {}, coloured(text, name))),
  );
}

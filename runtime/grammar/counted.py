"""Bounded repeats of one character in a grammar's text, counted instead of unrolled.

xgrammar makes a state of each character that `[a-z]{1,500}` may take, and asks for each which of
all tokens may follow. A rule with `max_chars` has one state, and the matcher counts beside it: the
rule is a repeat without end, which may end everywhere, so that the bound only ever ends it.
Source: xgrammar 0.2.8, grammar_parser.cc (attributes of rules) and grammar_matcher.cc; a character
is a code point there, as in JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from xgrammar import Grammar

FEWEST = 9  # of characters that are counted: fewer make so few states that counting costs more
_MOST_BEHIND = 3  # characters that must be there may stand behind the counted ones: one more state

_PATTERN = re.compile(r'^(\w+) ::= Regex\("((?:[^"\\]|\\.)*)", json_string=true\)$', re.M)
_CHARACTER = re.compile(r'^(\w+) ::= \(\((\[(?:[^\]\\]|\\.)*\]|"(?:[^"\\]|\\[^xuU])")\)\)$', re.M)
_RULE = re.compile(r"^(\w+)(?= ::= |\[)", re.M)
_PART = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|(\b\w+)\{(\d+), (\d+)\}')
_WORD = re.compile(_PART.pattern.split("|(")[0] + r"|\b[A-Za-z_]\w*")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[?*+{]")
_BOUND = re.compile(r"\{\d*,\s*(\d+)\}|\{(\d+)\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", re.S)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "b": "\b", "f": "\f", "v": "\v", "a": "\a"}


class Counted(NamedTuple):
    """counts: whether the matcher counts characters anywhere in it. text_bytes: about as many as
    it has as text when it is compiled: each rule is written with the automaton of all.
    """

    grammar: Grammar
    counts: bool
    text_bytes: int


def count_characters(grammar: Grammar) -> Counted:
    """The same language. Repeats of at least FEWEST characters of one class are counted."""
    text = str(grammar)
    counted = _counted(_PATTERN.sub(_spread, text))
    same = counted == text
    return Counted(
        grammar if same else Grammar.from_ebnf(counted),
        "[max_chars=" in counted,
        len(counted) * len(_RULE.findall(counted)),
    )


def with_bounds_apart(value: str, grammar_of: Callable[[str], Grammar]) -> Grammar:
    """The grammar of a schema or a structural tag. Bounded patterns of ASCII are put in afterwards:
    xgrammar makes an automaton of each while it reads the schema, in seconds for {1,5000}.
    """
    bounded: dict[str, str] = {}  # pattern -> what stands for it

    def stand_in(node: dict[str, Any]) -> dict[str, Any]:
        pattern = node.get("pattern")
        if isinstance(pattern, str) and pattern.isascii() and _highest_bound(pattern) >= FEWEST:
            node["pattern"] = bounded.setdefault(pattern, f"^pattern{len(bounded)}of{id(bounded)}$")
        return node

    shortened = json.loads(value, object_hook=stand_in)
    if not bounded:
        return grammar_of(value)
    text = str(grammar_of(json.dumps(shortened)))
    for pattern, name in bounded.items():
        rule = f'Regex("{name}", json_string=true)'
        text = text.replace(rule, f"Regex({json.dumps(pattern)}, json_string=true)")
    if f"of{id(bounded)}" in text:  # it stands in a value that is no schema
        return grammar_of(value)
    return Grammar.from_ebnf(_PATTERN.sub(_spread, text))


def _highest_bound(pattern: str) -> int:
    return max((int(high or exact) for high, exact in _BOUND.findall(pattern)), default=0)


def _counted(text: str) -> str:
    characters = dict(_CHARACTER.findall(text))
    rules: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        name, low, high = match[1], int(match[2] or 0), int(match[3] or 0)
        if name not in characters or high < FEWEST or high == low:
            return match[0]
        more = f"{name}_up_to_{high - low}"
        body = characters[name]
        rules[more] = f"{more}[max_chars={high - low}] ::= {_as_class(body)}*"
        if low <= _MOST_BEHIND:
            return " ".join([more, *[name] * low])
        return f"{name}{{{low}, {low}}} {more}"

    text = _PART.sub(replace, text)
    return "\n".join([text, *rules.values()]) if rules else text


def _as_class(body: str) -> str:
    if body.startswith("["):
        return body
    return f"[\\u{ord(_unescaped(body[1:-1])):04x}]"


def _spread(match: re.Match[str]) -> str:
    """A pattern as rules, where it has bounds that may be counted, or a group that is repeated.

    xgrammar 0.2.8 makes a wrong automaton of some of those: of ^a(b[0-9]+)?$ one that takes "a1".
    """
    name, pattern = match[1], _unescaped(match[2])
    if _highest_bound(pattern) < FEWEST and not _REPEATED_GROUP.search(pattern):
        return match[0]
    text = str(Grammar.from_regex(pattern))
    own = {rule: f"{name}_of_{rule}" for rule in _RULE.findall(text)}
    renamed = _WORD.sub(lambda word: own.get(word[0], word[0]), text)
    return f"{renamed.rstrip()}\n{name} ::= (({own['root']}))"


def _unescaped(text: str) -> str:
    def char(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        return chr(int(code, 16)) if code else _NAMED.get(match[4], match[4])

    return _ESCAPE.sub(char, text)

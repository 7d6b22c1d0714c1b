"""A regular expression as a tree, and trees as text; lengths, and what of a tree is short enough.

Trees are tuples: ("chars", ranges), ("seq", trees), ("alt", trees), ("rep", tree, low, high or
None), ("look", tree, wanted). Classes come spelt out (`grammar/regex_classes.py`). Back-references
and word boundaries are refused.
"""

from __future__ import annotations

import re
from typing import Any

from enginehouse.runtime.grammar.regex_classes import complement, spell_out
from enginehouse.runtime.grammar.support import NEWEST, SchemaError
from enginehouse.runtime.schemas.effort import check_effort

Tree = tuple[Any, ...]
EMPTY: Tree = ("seq", ())
JSON_TEXT = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
_ONE: Tree = ("one",)
ANYTHING: Tree = ("rep", ("chars", JSON_TEXT), 0, None)
_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")
_MOST_REPEATS = 8  # of a part without end, where all must end somewhere


def parse(pattern: str, whole: bool = False) -> Tree:
    """A JSON string that holds the pattern somewhere; whole: that is it, anchors or not."""
    parser = _Parser(spell_out(pattern, NEWEST, in_json=True), pattern)
    branches = parser.alternatives(top=True, whole=whole)
    if parser.at < len(parser.text):
        raise parser.error("has a ) too many")
    return branches


class _Parser:
    def __init__(self, text: str, pattern: str) -> None:
        self.text, self.pattern, self.at = text, pattern, 0

    def error(self, why: str) -> SchemaError:
        return SchemaError(f"the pattern {self.pattern[:40]!r} {why}; write it without")

    def alternatives(self, top: bool = False, whole: bool = False) -> Tree:
        branches = [self.sequence(top, whole)]
        while self.text.startswith("|", self.at):
            self.at += 1
            branches.append(self.sequence(top, whole))
        return alt(branches)

    def sequence(self, top: bool, whole: bool) -> Tree:
        items: list[Tree] = []
        begins = top and self.text.startswith("^", self.at)
        self.at += begins
        ends = False
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if (
                top
                and self.text[self.at] == "$"
                and self.text[self.at + 1 : self.at + 2] in ("", "|")
            ):
                self.at += 1
                ends = True
                break
            items.append(self.repeated())
        if top and not begins and not whole:
            items.insert(0, ANYTHING)
        if top and not ends and not whole:
            items.append(ANYTHING)
        return seq(items)

    def repeated(self) -> Tree:
        item = self.item()
        while self.at < len(self.text):
            char, match = self.text[self.at], _COUNT.match(self.text, self.at)
            if char in "*+?":
                low, high = (1 if char == "+" else 0), (1 if char == "?" else None)
                self.at += 1
            elif match:
                low = int(match[1])
                high = int(match[3]) if match[3] else None if match[2] else low
                self.at = match.end()
                if high is not None and high < low:
                    raise self.error("has a count the wrong way round")
            else:
                break
            self.at += self.text.startswith("?", self.at)  # lazy: the same language
            item = ("rep", item, low, high)
        return item

    def item(self) -> Tree:
        text, start = self.text, self.at
        char = text[start]
        if char == "(":
            return self.group()
        if char == "[":
            return self.characters()
        if char in "^$":
            raise self.error(f"has {char} within")
        if char in "*+?":
            raise self.error(f"has nothing to repeat before {char}")
        if char == "\\":
            char = text[start + 1 : start + 2]
            self.at += 1
            if not char or char.isalnum():
                raise self.error(f"has \\{char}, which is no regular expression's")
        self.at += 1
        return ("chars", ((ord(char), ord(char)),))

    def group(self) -> Tree:
        text, start = self.text, self.at
        self.at += 1
        look = None
        if text.startswith("?", self.at):
            for mark, wanted in (("?:", None), ("?=", True), ("?!", False)):
                if text.startswith(mark, self.at):
                    self.at, look = self.at + 2, wanted
                    break
            else:
                name = re.compile(r"\?<[A-Za-z_]\w*>").match(text, self.at)
                if not name:
                    raise self.error("looks behind, or has a group of an unknown kind")
                self.at = name.end()
        if look is not None and text[:start] == "^":
            self.at += text.startswith("^", self.at)  # it looks from the beginning already
        inner = self.lookahead() if look is not None else self.alternatives()
        if not text.startswith(")", self.at):
            raise self.error("has an open group")
        self.at += 1
        return inner if look is None else ("look", inner, look)

    def lookahead(self) -> Tree:
        """What is looked at: up to the end where it says so, and whatever follows elsewhere."""
        branches = []
        while True:
            items = []
            while self.at < len(self.text) and self.text[self.at] not in "|)":
                if self.text[self.at] == "$" and self.text[self.at + 1 : self.at + 2] in ("|", ")"):
                    self.at += 1
                    break
                items.append(self.repeated())
            else:
                items.append(ANYTHING)
            branches.append(seq(items))
            if not self.text.startswith("|", self.at):
                return alt(branches)
            self.at += 1

    def characters(self) -> Tree:
        """A class that `spell_out` wrote: characters, ranges, \\xNN for ASCII, ^ for all others."""
        at = self.at + 1
        negated = self.text.startswith("^", at)
        at += negated
        codes: list[int] = []
        ranges: list[tuple[int, int]] = []
        opened = False
        while at < len(self.text) and self.text[at] != "]":
            if self.text[at] == "-" and codes and not opened:
                opened, at = True, at + 1
                continue
            if self.text.startswith("\\x", at):
                code, at = int(self.text[at + 2 : at + 4], 16), at + 4
            else:
                code, at = ord(self.text[at]), at + 1
            if opened:
                ranges.append((codes.pop(), code))
                opened = False
            else:
                codes.append(code)
        ranges += [(code, code) for code in codes]
        self.at = at + 1
        return ("chars", tuple(complement(ranges) if negated else merge(ranges)))


def merge(ranges: Any) -> tuple[tuple[int, int], ...]:
    return tuple(complement(complement(ranges)))


def seq(items: Any) -> Tree:
    flat: list[Tree] = []
    for item in items:
        flat += item[1] if item[0] == "seq" else [item]
    return flat[0] if len(flat) == 1 else ("seq", tuple(flat))


def alt(branches: Any) -> Tree:
    flat: dict[Tree, None] = {}
    ranges: dict[tuple[int, int], None] = {}  # of single characters, which become one class
    for branch in branches:
        for each in branch[1] if branch[0] == "alt" else [branch]:
            if each[0] == "chars":
                ranges |= dict.fromkeys(each[1])
                each = _ONE
            flat[each] = None
    if _ONE in flat:
        flat = {("chars", merge(ranges)) if each is _ONE else each: None for each in flat}
    return next(iter(flat)) if len(flat) == 1 else ("alt", tuple(flat))


def lengths(tree: Tree) -> tuple[int, int | None]:
    """Of the shortest and the longest text, in characters; None: without end."""
    kind = tree[0]
    if kind == "chars":
        return 1, 1
    if kind == "look":
        return 0, 0
    if kind == "rep":
        low, high = lengths(tree[1])
        most = None if (tree[3] is None or high is None) and high != 0 and tree[3] != 0 else 0
        return low * tree[2], most if most is None else (high or 0) * (tree[3] or 0)
    parts = [lengths(part) for part in tree[1]]
    lows, highs = [low for low, _ in parts], [high for _, high in parts]
    total = sum if kind == "seq" else max
    low = sum(lows) if kind == "seq" else min(lows)
    return low, None if None in highs else total(h for h in highs if h is not None) if highs else 0


def at_most(tree: Tree, most: int) -> Tree | None:
    """Texts of the tree with at most that many characters: some of them, and no other."""
    low, high = lengths(tree)
    if high is not None and high <= most:
        return tree
    if low > most:
        return None
    if tree[0] == "alt":
        return alt([short for part in tree[1] if (short := at_most(part, most)) is not None])
    if tree[0] == "seq":
        return _shared(list(tree[1]), most - low)
    inner, fewest, limit = tree[1], tree[2], tree[3]
    least, longest = lengths(inner)
    if longest is not None and longest * max(fewest, 1) <= most:
        count = most // longest
        return ("rep", inner, fewest, count if limit is None else min(limit, count))
    count = max(fewest, min(_MOST_REPEATS if limit is None else limit, most // max(least, 1), 8))
    while count > max(fewest, 1) and most // count < max(least, 4):
        count -= 1
    short = at_most(inner, most // count) if count else None
    return ("rep", short, fewest, count) if short is not None else (EMPTY if not fewest else None)


def _shared(items: list[Tree], room: int) -> Tree | None:
    """The room beyond the shortest is shared out; what needs little leaves it to the rest."""

    def stretch(index: int) -> float:
        low, high = lengths(items[index])
        return float("inf") if high is None else high - low

    order = sorted((i for i in range(len(items)) if stretch(i) > 0), key=stretch)
    for position, index in enumerate(order):
        take = int(min(stretch(index), room // (len(order) - position)))
        check_effort()
        short = at_most(items[index], lengths(items[index])[0] + take)
        if short is None:
            return None
        items[index] = short
        room -= take
    return seq(items)


def at_least(tree: Tree, least: int) -> Tree | None:
    """Texts of the tree with at least that many characters: some of them, and no other."""
    low, high = lengths(tree)
    if low >= least:
        return tree
    if high is not None and high < least:
        return None
    if tree[0] == "alt":
        long = [part for each in tree[1] if (part := at_least(each, least)) is not None]
        return alt(long) if long else None
    if tree[0] == "seq":
        items = list(tree[1])
        for index, item in enumerate(items):
            check_effort()
            missing = least - sum(lengths(each)[0] for each in items)
            own_low, own_high = lengths(item)
            wanted = own_low + missing if own_high is None else min(own_low + missing, own_high)
            if missing > 0 and (longer := at_least(item, wanted)) is not None:
                items[index] = longer
        made = seq(items)
        return made if lengths(made)[0] >= least else None
    inner_low = lengths(tree[1])[0]
    if inner_low == 0:
        return None
    count = -(-least // inner_low)
    return ("rep", tree[1], count, tree[3]) if tree[3] is None or count <= tree[3] else None


def text_of(tree: Tree) -> str:
    """A pattern of the whole string, without its anchors."""
    kind = tree[0]
    if kind == "chars":
        parts = [_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in tree[1]]
        return f"[{''.join(parts)}]"
    if kind == "seq":
        return "".join(f"({text_of(p)})" if p[0] == "alt" else text_of(p) for p in tree[1])
    if kind == "alt":
        return "|".join(text_of(part) for part in tree[1])
    low, high = tree[2], tree[3]
    names = {(0, None): "*", (1, None): "+", (0, 1): "?", (1, 1): ""}
    count = f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"
    inner = text_of(tree[1])
    if tree[1][0] != "chars":
        inner = f"({inner})"
    return inner + names.get((low, high), count)


def _char(code: int) -> str:
    return chr(code) if chr(code).isalnum() and code < 0x80 else f"\\u{{{code:x}}}"

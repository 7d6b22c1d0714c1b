"""Character classes of a regular expression, spelt out as ranges of code points.

xgrammar's negated classes and its dot reach into bytes that are no UTF-8, and its dot matches
line breaks; its \\x41 takes every hexadecimal digit that follows. Spelt out, a class is what
ECMA-262 says; within JSON text it also leaves out what JSON must escape. What is neither a class
nor an escape stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from enginehouse.runtime.grammar.support import SchemaError, Support

Range = tuple[int, int]

_TEXT: list[Range] = [(0x01, 0xD7FF), (0xE000, 0x10FFFF)]
_JSON_TEXT: list[Range] = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]
_SURROGATES = (0xD800, 0xDFFF)
_LINE_ENDS: list[Range] = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_DIGIT: list[Range] = [(0x30, 0x39)]
_WORD: list[Range] = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: list[Range] = [(0x09, 0x0D), (0x20, 0x20)]
_EVERY_SPACE: list[Range] = [
    *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_UNBOUNDED = re.compile(r"[*+]|\{\d+,\}")
_CODE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\})")


class _Item(NamedTuple):
    """A part of a class: what it matches, where it ends, and its code point if it is one."""

    ranges: list[Range]
    end: int
    code: int | None = None


def spell_out(pattern: str, support: Support, in_json: bool = False) -> str:
    """The pattern with every class, dot and escape as explicit ranges or characters.

    in_json: of a JSON string. SchemaError for what cannot be followed exactly.
    """
    whole = _JSON_TEXT if in_json else _TEXT
    out, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        item = _one(ord(char), i + 1)
        if char == ".":
            item = _Item(complement(_LINE_ENDS), i + 1)
        elif char == "[":
            item = _class(pattern, i)
        elif char == "\\":
            item = _escape(pattern, i)
        text = pattern[i : item.end]
        if (char == "^" and i > 0) or (char == "$" and item.end < len(pattern)):
            support.require("anchors within", f"{char!r} within {pattern[:40]!r}")
        found = intersect(item.ranges, whole)
        if not found:
            where = "a pattern of a JSON string" if in_json else "a regular expression"
            raise SchemaError(f"{text[:40]!r} cannot be in {where}; leave it out")
        if item.code is None:
            text = _class_text(
                found, text, support, _UNBOUNDED.match(pattern, item.end) is not None
            )
        elif char == "\\" and text[1].isalnum():
            text = _written(found) if item.code < 0x80 else chr(item.code)
        out.append(text)
        i = item.end
    return "".join(out)


def _class_text(found: list[Range], text: str, support: Support, unbounded: bool) -> str:
    """A class in words that this version follows. text: the words it stands in.

    Where it may be repeated without end, one that leaves out some of ASCII may say so: bytes that
    are no UTF-8 become at least one character, and none that is left out.
    """
    if found[-1][1] <= 0x7F or support.has("classes beyond ASCII"):
        return _written(found)
    left_out = [each for each in complement(found) if each != _SURROGATES]
    if not unbounded or any(high > 0x7F for _, high in left_out):
        support.require(
            "classes beyond ASCII",
            f"{text[:40]!r}, which holds characters beyond ASCII,",
            "name the characters of ASCII instead, such as [ -~], or leave some of them out "
            "with * or + behind, such as [^\\n]*",
        )
    return f"[^{_written(left_out)[1:]}"


def complement(ranges: Iterable[Range]) -> list[Range]:
    """All code points that are in none of the ranges."""
    result, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            result.append((start, low - 1))
        start = max(start, high + 1)
    if start <= 0x10FFFF:
        result.append((start, 0x10FFFF))
    return result


def intersect(first: Iterable[Range], second: Iterable[Range]) -> list[Range]:
    """Code points of both, in order."""
    pairs = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return sorted((low, high) for low, high in pairs if low <= high)


def _class(pattern: str, start: int) -> _Item:
    """What `[...]` at start matches, and where it ends."""
    i = start + 1
    negated = pattern.startswith("^", i)
    i += negated
    ranges: list[Range] = []
    escapes: set[str] = set()
    while i < len(pattern) and pattern[i] != "]":
        item = _member(pattern, i)
        if item.code is not None and pattern.startswith("-", item.end):
            last = _member(pattern, item.end + 1) if pattern[item.end + 1 :] else None
            if last is not None and last.code is not None and pattern[item.end + 1] != "]":
                ranges.append((item.code, last.code))
                i = last.end
                continue
        ranges += item.ranges
        escapes.add(pattern[i : item.end])
        i = item.end
    if {r"\s", r"\S"} <= escapes:
        ranges = complement([])  # whatever space is
    if i >= len(pattern) or not ranges or any(low > high for low, high in ranges):
        raise SchemaError(
            f"the class {pattern[start : i + 1][:40]!r} is empty, open or the wrong way round; "
            "wanted one such as [a-z]"
        )
    return _Item(complement(ranges) if negated else _merged(ranges), i + 1)


def _member(pattern: str, i: int) -> _Item:
    if pattern[i] == "\\":
        return _escape(pattern, i)
    return _one(ord(pattern[i]), i + 1)


def _escape(pattern: str, i: int) -> _Item:
    name = pattern[i + 1 : i + 2]
    sets = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
    if name in sets:
        return _Item(sets[name], i + 2)
    if name in ("D", "W", "S"):
        return _Item(complement({"D": _DIGIT, "W": _WORD, "S": _EVERY_SPACE}[name]), i + 2)
    if name in _CONTROLS:
        return _one(_CONTROLS[name], i + 2)
    if match := _CODE.match(pattern, i):
        code = int(next(group for group in match.groups() if group), 16)
        if code <= 0x10FFFF:
            return _one(code, match.end())
    if name and not name.isalnum():
        return _one(ord(name), i + 2)
    raise SchemaError(
        f"the escape {pattern[i : i + 2]!r} is not supported; wanted one such as \\d or \\u00e9"
    )


def _one(code: int, end: int) -> _Item:
    return _Item([(code, code)], end, code)


def _merged(ranges: list[Range]) -> list[Range]:
    return complement(complement(ranges))


def _written(ranges: list[Range]) -> str:
    parts = [_char(low) if low == high else f"{_char(low)}-{_char(high)}" for low, high in ranges]
    return f"[{''.join(parts)}]"


def _char(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x80 else chr(code)

"""Character classes of a regular expression, spelt out as ranges of code points.

xgrammar's negated classes and its dot reach into bytes that are no UTF-8, and its dot matches
line breaks. Spelt out, a class is what ECMA-262 says; within JSON text it also leaves out what
JSON must escape. Everything else of the pattern stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

Range = tuple[int, int]

_TEXT: list[Range] = [(0x01, 0xD7FF), (0xE000, 0x10FFFF)]
_JSON_TEXT: list[Range] = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]
_LINE_ENDS: list[Range] = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_DIGIT: list[Range] = [(0x30, 0x39)]
_WORD: list[Range] = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: list[Range] = [(0x09, 0x0D), (0x20, 0x20)]
_EVERY_SPACE: list[Range] = [
    *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_CODE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\})")


class _Item(NamedTuple):
    """A part of a class: what it matches, where it ends, and its code point if it is one."""

    ranges: list[Range]
    end: int
    code: int | None = None


def spell_out(pattern: str, in_json: bool = False) -> str:
    """The pattern with every class and dot as explicit ranges; in_json: of a JSON string."""
    whole = _JSON_TEXT if in_json else _TEXT
    out, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        ranges, end = None, i + 1
        if char == ".":
            ranges = complement(_LINE_ENDS)
        elif char == "[":
            ranges, end = _class(pattern, i)
        elif char == "\\":
            end = i + 2
            item = _escape(pattern, i)
            if item is not None and item.code is None:
                ranges = item.ranges
        found = None if ranges is None else intersect(ranges, whole)
        out.append(pattern[i:end] if not found else _written(found))
        i = end
    return "".join(out)


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


def _class(pattern: str, start: int) -> tuple[list[Range] | None, int]:
    """What `[...]` at start matches, and where it ends; None for one that is not understood."""
    i = start + 1
    negated = pattern.startswith("^", i)
    i += negated
    ranges: list[Range] = []
    while i < len(pattern) and pattern[i] != "]":
        item = _member(pattern, i)
        if item is None:
            return None, start + 1
        if item.code is not None and pattern.startswith("-", item.end):
            last = _member(pattern, item.end + 1) if pattern[item.end + 1 :] else None
            if last is not None and last.code is not None and pattern[item.end + 1] != "]":
                if last.code < item.code:
                    return None, start + 1
                ranges.append((item.code, last.code))
                i = last.end
                continue
        ranges += item.ranges
        i = item.end
    if i >= len(pattern) or not ranges:
        return None, start + 1
    return (complement(ranges) if negated else _merged(ranges)), i + 1


def _member(pattern: str, i: int) -> _Item | None:
    if pattern[i] == "\\":
        return _escape(pattern, i)
    return _one(ord(pattern[i]), i + 1)


def _escape(pattern: str, i: int) -> _Item | None:
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
        return _one(code, match.end()) if code <= 0x10FFFF else None
    if name and not name.isalnum():
        return _one(ord(name), i + 2)
    return None


def _one(code: int, end: int) -> _Item:
    return _Item([(code, code)], end, code)


def _merged(ranges: list[Range]) -> list[Range]:
    return complement(complement(ranges))


def _written(ranges: list[Range]) -> str:
    parts = [_char(low) if low == high else f"{_char(low)}-{_char(high)}" for low, high in ranges]
    return f"[{''.join(parts)}]"


def _char(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x80 else chr(code)

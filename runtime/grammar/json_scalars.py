"""Schemas of strings and numbers, in words that the grammar compiler enforces exactly.

Each function takes the keywords of one type and gives those that say the same. Knows no schema
beyond that, and no reference.
Source: JSON Schema 2020-12, validation, sections 6.2 and 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from enginehouse.runtime.grammar.regex_classes import spell_out
from enginehouse.runtime.grammar.string_formats import BUILT_IN, PATTERNS
from enginehouse.runtime.grammar.support import SchemaError, Support

MAX_BLOCKS = 200  # that a range of integers is cut up into, where it must be


def exact_string(node: dict[str, Any], path: str, support: Support) -> dict[str, Any]:
    """Of pattern, format, minLength and maxLength."""
    return {"type": "string", **_exact_string(node, path, support)}


def _exact_string(node: dict[str, Any], path: str, support: Support) -> dict[str, Any]:
    shortest, longest = node.pop("minLength", 0), node.pop("maxLength", None)
    if shortest == 0 and longest is None:
        refuse_both(node, path, "pattern", "format")
    elif node:
        raise SchemaError(
            f"{path}: {next(iter(node))} beside minLength or maxLength is not supported; "
            "put the length into the pattern"
        )
    else:
        return {"pattern": _of_length(shortest, longest, path, support)}
    if "pattern" in node:
        if not isinstance(node["pattern"], str):
            raise SchemaError(f"{path}.pattern is no string; wanted a regular expression")
        return {"pattern": exact_pattern(node["pattern"], f"{path}.pattern", support)}
    if "format" in node:
        name = node["format"]
        if name in PATTERNS:
            return {"pattern": exact_pattern(PATTERNS[name], f"{path}.format", support)}
        if name not in BUILT_IN:
            raise SchemaError(
                f"{path}.format is {str(name)[:40]!r}; "
                f"wanted one of {', '.join(sorted({*BUILT_IN, *PATTERNS}))}"
            )
    return node


def exact_pattern(pattern: str, where: str, support: Support) -> str:
    """A pattern for the whole of a JSON string."""
    try:
        spelt = spell_out(pattern, support, in_json=True)
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}") from None
    if support.has("alternatives in strings"):
        return spelt
    end = spelt.endswith("$") and not spelt.endswith(r"\$")
    return f"({spelt.removeprefix('^')[: -1 if end else None]})"


def _of_length(shortest: int, longest: int | None, path: str, support: Support) -> str:
    """xgrammar's own bounds let raw control characters through."""
    if longest is not None:
        support.require(
            "maxLength",
            f"{path}.maxLength",
            f"leave it out, or set a pattern of ASCII, such as ^[ -~]{{{shortest},{longest}}}$",
        )
    bounds = f"{shortest},{'' if longest is None else longest}"
    return spell_out(f"^[^\\x00]{{{bounds}}}$", support, in_json=True)


def exact_integer(node: dict[str, Any], path: str, support: Support) -> dict[str, Any]:
    """Of multipleOf, or of the bounds, which become inclusive ones."""
    _check_numbers(node, path)
    if "multipleOf" in node:
        refuse_both(node, path, "multipleOf", next((k for k in node if k != "multipleOf"), ""))
        support.require("multipleOf", f"{path}.multipleOf")
        return {"type": "integer", **node}
    lows = [math.ceil(node["minimum"])] if "minimum" in node else []
    lows += [math.floor(node["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in node else []
    highs = [math.floor(node["maximum"])] if "maximum" in node else []
    highs += [math.ceil(node["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in node else []
    if lows and highs and max(lows) > min(highs):
        raise SchemaError(f"{path} is an empty range of integers; wanted one that holds some")
    low, high = max(lows, default=None), min(highs, default=None)
    if not support.has("bounds of integers"):
        return _followed_range(low, high, path, support)
    return _range(low, high)


def _followed_range(
    low: int | None, high: int | None, path: str, support: Support
) -> dict[str, Any]:
    """The same range in those that every version follows: from 0, from 10 or more, up to 0, within
    -99 to 99, and the blocks that `_blocks` gives for the rest.
    """
    if low is None and high is None:
        return {"type": "integer"}
    parts: list[dict[str, Any]] = []
    more: list[tuple[int, int]] = []  # in blocks
    if high is None:
        assert low is not None, "one of them is set"
        start = max(low, 0) if low <= 1 or low >= 10 else 10
        parts.append(_range(start, None))
        if low < start:
            parts.append(_range(max(low, -99), start - 1))
        more = [(low, -100)]
    elif low is None:
        parts.append(_range(None, 0))
        more = [(1, high)]
    else:
        if low <= 99 and high >= -99:
            parts.append(_range(max(low, -99), min(high, 99)))
        more = [(low, min(high, -100)), (max(low, 100), high)]
    blocks = _blocks(more)
    if blocks is None or (low is None and high is not None and high < 0):
        support.require(
            "bounds of integers",
            f"{path}: this range of integers",
            "leave its bounds out, or set rounder ones, such as 0 to 99999",
        )
    parts += [_range(*block) for block in blocks or []]
    return parts[0] if len(parts) == 1 else {"anyOf": parts}


def _range(low: int | None, high: int | None) -> dict[str, Any]:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer", **{key: value for key, value in bounds.items() if value is not None}}


def _blocks(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Ranges on one side of 0, cut up; None for more than MAX_BLOCKS. Empty ones give none.

    A block holds all numbers of some length from one first digit to another, or of one beginning
    those whose last two digits, or last digit, are from one to another.
    """
    found: list[tuple[int, int]] = []
    for low, high in ranges:
        sign = -1 if low < 0 else 1
        start, end = sorted((abs(low), abs(high))) if low <= high else (1, 0)
        while start <= end:
            size = 10 ** (len(str(start)) - 1)  # of all numbers with one first digit
            if start % size or start + size - 1 > end:
                size = 10 if start % 10 == 0 and start + 9 <= end else 1
            room = 10 - start // size % 10  # until the digit is 9
            count = min(room, (end + 1 - start) // size)
            last = start + count * size - 1
            found.append((start, last) if sign > 0 else (-last, -start))
            if len(found) > MAX_BLOCKS:
                return None
            start = last + 1
    return found


def exact_number(node: dict[str, Any], path: str, support: Support) -> dict[str, Any]:
    """Of the bounds."""
    _check_numbers(node, path)
    if node:
        support.require("bounds of numbers", f"{path}.{next(iter(node))} of a number")
    return {"type": "number", **node}


def refuse_both(node: dict[str, Any], path: str, first: str, second: str) -> None:
    if first in node and second in node:
        raise SchemaError(f"{path}: {first} beside {second} is not supported; choose one of them")


def _check_numbers(node: dict[str, Any], path: str) -> None:
    for keyword, value in node.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SchemaError(f"{path}.{keyword} is no number; wanted a number")
        if abs(value) > 2**53 or round(value, 6) != value:
            raise SchemaError(
                f"{path}.{keyword} is out of reach; wanted a number of at most 6 decimals "
                "between -2**53 and 2**53"
            )

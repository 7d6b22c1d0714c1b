"""Schemas of strings and numbers, in words that the grammar compiler enforces exactly.

Each function takes the keywords of one type and gives those that say the same. Knows no schema
beyond that, and no reference.
Source: JSON Schema 2020-12, validation, sections 6.2 and 6.3.
"""

from __future__ import annotations

import math
from typing import Any

from enginehouse.runtime.constraint_support import SchemaError, Support
from enginehouse.runtime.regex_classes import spell_out
from enginehouse.runtime.string_formats import BUILT_IN, PATTERNS

MAX_LISTED = 1000  # values that a range of integers is written out as, where it must be


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
    elif not support.has("classes beyond ASCII"):
        return rf'[^"\\\x00-\x1f]{{{shortest},}}'
    bounds = f"{shortest},{'' if longest is None else longest}"
    return spell_out(f"^[\\s\\S]{{{bounds}}}$", support, in_json=True)


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
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer", **{key: value for key, value in bounds.items() if value is not None}}


def _followed_range(
    low: int | None, high: int | None, path: str, support: Support
) -> dict[str, Any]:
    """The same range in those that every version follows: from 0, from 10 or more, up to 0, within
    -99 to 99; and a list of the rest.
    """
    parts: list[dict[str, Any]] = []
    rest, is_followed = range(0), True
    if low is not None and high is not None:
        is_followed = low >= -99
        if low <= 99:
            parts = [{"type": "integer", "minimum": low, "maximum": min(high, 99)}]
        rest = range(max(low, 100), high + 1)
    elif low is not None:
        is_followed = low >= -99
        start = 0 if low < 0 else 10 if 1 < low < 10 else low
        parts = [{"type": "integer", "minimum": start}]
        if low < start:
            parts.append({"type": "integer", "minimum": low, "maximum": start - 1})
    elif high is not None:
        is_followed = high >= 0
        parts, rest = [{"type": "integer", "maximum": 0}], range(1, high + 1)
    else:
        return {"type": "integer"}
    if len(rest) > MAX_LISTED or not is_followed:
        support.require(
            "bounds of integers",
            f"{path}: this range of integers",
            f"leave its bounds out, or set both around at most {MAX_LISTED} integers from -99 on",
        )
    if rest:
        parts.append({"type": "integer", "enum": list(rest)})
    return parts[0] if len(parts) == 1 else {"anyOf": parts}


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

"""Whether no value satisfies two branches of a oneOf: proved from plain schemas, or not at all."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from enginehouse.runtime.grammar.json_schema import MAX_DEPTH
from enginehouse.runtime.schemas.effort import check_effort
from enginehouse.runtime.schemas.values import key_of

_MOST_BRANCHES = 128
_DEPTH = 4  # of values in values that are looked at


def disjoint(branches: list[Any], defs: dict[str, Any]) -> bool:
    if len(branches) > _MOST_BRANCHES:
        return False
    resolved = [_resolved(branch, defs) for branch in branches]
    return all(_apart(a, b, defs, _DEPTH) for a, b in combinations(resolved, 2))


def _resolved(branch: Any, defs: dict[str, Any]) -> dict[str, Any]:
    for _ in range(MAX_DEPTH):
        if not isinstance(branch, dict) or "$ref" not in branch:
            break
        branch = defs.get(branch["$ref"].removeprefix("#/$defs/"), {})
    return branch if isinstance(branch, dict) else {}


def _apart(first: dict[str, Any], second: dict[str, Any], defs: dict[str, Any], depth: int) -> bool:
    check_effort()
    if depth == 0:
        return False
    for one, other in ((first, second), (second, first)):
        for keyword in ("anyOf", "oneOf"):
            if keyword in one:
                parts = [_resolved(part, defs) for part in one[keyword]]
                return all(_apart(part, other, defs, depth - 1) for part in parts)
    if "enum" in first and "enum" in second:
        return not {*map(key_of, first["enum"])} & {*map(key_of, second["enum"])}
    kinds = _kinds(first), _kinds(second)
    if None not in kinds and not (kinds[0] or set()) & (kinds[1] or set()):
        return True
    if "enum" in first or "enum" in second or first.get("type") != second.get("type"):
        return False
    if first.get("type") in ("integer", "number"):
        return _above(first, second) or _above(second, first)
    if first.get("type") == "object":
        return _objects_apart(first, second, defs, depth)
    return False


def _objects_apart(
    first: dict[str, Any], second: dict[str, Any], defs: dict[str, Any], depth: int
) -> bool:
    """By a property that both must have, or that one must have and the other never has."""
    needed = {*first.get("required", [])}, {*second.get("required", [])}
    named = first.get("properties", {}), second.get("properties", {})
    for name in needed[0] & needed[1] & named[0].keys() & named[1].keys():
        parts = [_resolved(properties[name], defs) for properties in named]
        if _apart(parts[0], parts[1], defs, depth - 1):
            return True
    closed = [each.get("additionalProperties") is False for each in (first, second)]
    return bool(
        (closed[1] and needed[0] - named[1].keys() and "patternProperties" not in second)
        or (closed[0] and needed[1] - named[0].keys() and "patternProperties" not in first)
    )


def _kinds(node: dict[str, Any]) -> set[str] | None:
    """The types of its values, integers as numbers; None: any."""
    if "enum" in node:
        return {_kind(value) for value in node["enum"]}
    kind = node.get("type")
    if not isinstance(kind, str):
        return None
    return {"number" if kind == "integer" else kind}


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return kinds[type(value)]


def _above(first: dict[str, Any], second: dict[str, Any]) -> bool:
    low = max((first[k] for k in ("minimum", "exclusiveMinimum") if k in first), default=None)
    high = min((second[k] for k in ("maximum", "exclusiveMaximum") if k in second), default=None)
    if low is None or high is None:
        return False
    open_end = first.get("exclusiveMinimum") == low or second.get("exclusiveMaximum") == high
    return bool(low > high or (low == high and open_end))

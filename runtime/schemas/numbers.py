"""Numbers of a schema within what the grammar compiler can say: int64 for integers, 6 decimals.

A bound beyond that is moved inwards: what is let through satisfies it, and a little more would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas.merged import MOST, Node, Nothing

_DECIMALS = 10**6
_MOST_LISTED = 1000  # multiples within bounds are listed up to here

LeaveOut = Callable[[str, str], None]


def plain_number(kind: str, node: Node, path: str, leave_out: LeaveOut) -> Node:
    """Of bounds and multipleOf; Nothing for an empty range."""
    for keyword, value in node.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool) or not isinstance(each, int | float):
                raise SchemaError(f"{path}.{keyword} is no number; wanted a number")
    multiple = node.pop("multipleOf", None)
    if isinstance(multiple, list):
        leave_out(f"{path}.multipleOf", "says two things that cannot be enforced together")
        multiple = None
    if multiple is not None and multiple <= 0:
        raise SchemaError(f"{path}.multipleOf is {str(multiple)[:40]}; wanted a number above 0")
    whole = kind == "integer"
    if multiple is not None and (isinstance(multiple, int) or multiple.is_integer()):
        whole, multiple = True, int(multiple)
    if multiple is not None and multiple > MOST:
        leave_out(f"{path}.multipleOf", "is out of reach; wanted a number up to 2**53")
        multiple = None
    step = Fraction(1) if whole else Fraction(1, _DECIMALS)
    low, high = _low(node, step), _high(node, step)
    if low is not None and high is not None and low > high:
        raise Nothing(f"{path} is an empty range of numbers; wanted one that holds some")
    if (low is not None and low > MOST) or (high is not None and high < -MOST):
        bound = "minimum" if low is not None and low > MOST else "maximum"
        leave_out(f"{path}.{bound}", "is out of reach; wanted a number between -2**53 and 2**53")
        low, high = None, None
    bounds: Node = {"type": "integer" if whole else "number"}
    if low is not None:
        bounds["minimum"] = _plain(max(low, Fraction(-MOST)))
    if high is not None:
        bounds["maximum"] = _plain(min(high, Fraction(MOST)))
    if multiple is None or multiple == 1:
        return bounds
    return _multiples(bounds, Fraction(str(multiple)), path, leave_out)


def _multiples(bounds: Node, multiple: Fraction, path: str, leave_out: LeaveOut) -> Node:
    if len(bounds) == 1 and bounds["type"] == "integer" and multiple.denominator == 1:
        return {**bounds, "multipleOf": int(multiple)}
    if "minimum" in bounds and "maximum" in bounds:
        first = math.ceil(Fraction(str(bounds["minimum"])) / multiple)
        last = math.floor(Fraction(str(bounds["maximum"])) / multiple)
        if last < first:
            raise Nothing(f"{path} has no multiple in its range; nothing satisfies it")
        if last - first < _MOST_LISTED:
            return {"enum": [_plain(n * multiple) for n in range(first, last + 1)]}
    leave_out(f"{path}.multipleOf", "cannot be enforced here; leave it out")
    return bounds


def _low(node: Node, step: Fraction) -> Fraction | None:
    """The least number that is allowed, on a grid of `step`."""
    lows = []
    if "minimum" in node:
        lows.append(math.ceil(_exact(node["minimum"]) / step) * step)
    if "exclusiveMinimum" in node:
        lows.append((math.floor(_exact(node["exclusiveMinimum"]) / step) + 1) * step)
    return max(lows, default=None)


def _high(node: Node, step: Fraction) -> Fraction | None:
    highs = []
    if "maximum" in node:
        highs.append(math.floor(_exact(node["maximum"]) / step) * step)
    if "exclusiveMaximum" in node:
        highs.append((math.ceil(_exact(node["exclusiveMaximum"]) / step) - 1) * step)
    return min(highs, default=None)


def _exact(value: Any) -> Fraction:
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)


def _plain(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)

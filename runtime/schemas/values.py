"""When two JSON values are equal, as JSON Schema has it: 1 is 1.0 and not true.

Source: JSON Schema core 2020-12, section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def key_of(value: Any) -> Hashable:
    """Two values are equal if their keys are; sets of keys keep long lists from being compared
    each with each.
    """
    if isinstance(value, dict):
        return "object", frozenset((name, key_of(item)) for name, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(key_of, value))
    if value is None or isinstance(value, bool):
        return "word", value
    return value  # type: ignore[no-any-return]  # a text or a number

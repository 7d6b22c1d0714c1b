"""Numbers out of a config.json, each refused by name when it is missing or no such number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.errors import CheckpointError

REMEDY = "is it the config.json of a complete checkpoint?"


def number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; CheckpointError names the key."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key}; {REMEDY}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive number")
    return float(value)


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; CheckpointError names the key."""
    value = number(hf, key, default)
    if not value.is_integer():
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive whole number")
    return int(value)

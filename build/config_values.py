"""Values out of a config.json, each refused by name when it is missing or of another kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.errors import CheckpointError

REMEDY = "is it the config.json of a complete checkpoint?"

# What no model reaches, and a damaged file must not make us count to.
_MANY = 10_000
LARGEST = {
    "num_hidden_layers": _MANY,
    "num_attention_heads": _MANY,
    "num_experts": _MANY,
    "num_local_experts": _MANY,
}


def number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; CheckpointError names the key."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key}; {REMEDY}")
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not 0 < value < math.inf:
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive number")
    return float(value)


def boolean(hf: Mapping[str, Any], key: str) -> bool:
    """True or false, false when it is absent; CheckpointError names the key."""
    value = hf.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"config.json has {key}={value!r}; wanted true or false")
    return bool(value)


def json_object(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object, empty when it is absent; CheckpointError names the key."""
    value = hf.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a JSON object")
    return dict(value)


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; CheckpointError names the key."""
    value = number(hf, key, default)
    if not value.is_integer() or value > LARGEST.get(key, 2**31):
        largest = LARGEST.get(key, 2**31)
        raise CheckpointError(
            f"config.json has {key}={value:g}; wanted a whole number from 1 to {largest}"
        )
    return int(value)

"""Hold a text that was generated against its schema, within a time limit and without the network.

A schema is a client's: its patterns may backtrack for ever, and its references may name any host.
Knows nothing of what the engine enforced.
Source: JSON Schema, as jsonschema reads it; only where it searches patterns is it ours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import regex
from jsonschema import ValidationError
from jsonschema.validators import Draft202012Validator, extend, validator_for
from jsonschema_specifications import REGISTRY

_LIMIT_S = 1.0


def verdict_of(schema: Mapping[str, Any], text: str, limit_s: float = _LIMIT_S) -> str:
    """valid or invalid by the schema, or unknown: it refers to elsewhere, has a pattern that cannot
    be read, or all its patterns together took more than limit_s.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return "invalid"
    if _keys_of(schema) >= {"patternProperties", "unevaluatedProperties"}:
        return "unknown"  # jsonschema itself searches the patterns of the two, without a limit
    known = validator_for(schema, Draft202012Validator)
    # the registry of its own would fetch what a reference names
    judge = extend(known, _Patterns(limit_s).keywords())(schema, registry=REGISTRY)
    try:
        return "valid" if judge.is_valid(value) else "invalid"
    except Exception:  # jsonschema has no one class for what it cannot decide
        return "unknown"


class _Patterns:
    """The keywords that search patterns; TimeoutError when all of them took more than limit_s.

    Other threads run while one is searched.
    """

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s

    def keywords(self) -> dict[str, Any]:
        return {
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
        }

    def _finds(self, pattern: str, text: str) -> bool:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:  # which regex would take for no limit
            raise TimeoutError
        return regex.search(pattern, text, timeout=left_s, concurrent=True) is not None

    def _pattern(self, judge: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        if isinstance(value, str) and not self._finds(pattern, value):
            yield ValidationError(f"{value!r} does not match {pattern!r}")

    def _pattern_properties(
        self, judge: Any, wanted: Any, value: Any, schema: Any
    ) -> Iterator[Any]:
        for key, item in value.items() if isinstance(value, dict) else ():
            for pattern, inner in wanted.items():
                if self._finds(pattern, key):
                    yield from judge.descend(item, inner)

    def _additional_properties(
        self, judge: Any, wanted: Any, value: Any, schema: Any
    ) -> Iterator[Any]:
        named, patterns = schema.get("properties", ()), schema.get("patternProperties", ())
        for key, item in value.items() if isinstance(value, dict) else ():
            if key not in named and not any(self._finds(pattern, key) for pattern in patterns):
                yield from judge.descend(item, wanted)


def _keys_of(schema: object) -> set[str]:
    """The keys of every object in it, at any depth."""
    keys: set[str] = set()
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            keys.update(item)
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return keys

"""jsonschema, made safe for the schemas of strangers: no network, and no pattern without end.

A client's patterns may backtrack for ever, and its references may name any host. Knows neither what
is enforced nor who asks.
Source: JSON Schema, as jsonschema reads it; only where it searches patterns, or compares every
value with every other one, is it ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import regex
from jsonschema import ValidationError
from jsonschema.validators import Draft202012Validator, extend, validator_for
from jsonschema_specifications import REGISTRY

from enginehouse.runtime.schemas.values import key_of


class Unjudged(Exception):
    """jsonschema would leave the limits that are kept here."""


def judge_of(schema: Any, limit_s: float) -> Any:
    """A validator of jsonschema whose patterns, all together, may take limit_s.

    Unjudged for a schema that it would judge by other rules than these. `is_valid` raises
    TimeoutError when the patterns took longer, and what jsonschema has for what it cannot decide: a
    pattern that cannot be read, a reference to elsewhere.
    """
    keys, drafts = _keys_of(schema)
    if keys >= {"patternProperties", "unevaluatedProperties"}:
        raise Unjudged("unevaluatedProperties searches the patterns of patternProperties by itself")
    own = isinstance(schema, Mapping) and isinstance(schema.get("$schema"), str)
    if drafts > own:  # below one, jsonschema goes on with that draft's own keywords
        raise Unjudged("a part has a $schema of its own")
    known = validator_for(schema, Draft202012Validator)
    # the registry of its own would fetch what a reference names
    return extend(known, _Keywords(limit_s).all())(schema, registry=REGISTRY)


class _Keywords:
    """Those that are ours. Other threads run while a pattern is searched."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s
        self._enums: dict[int, set[Any]] = {}

    def all(self) -> dict[str, Any]:
        return {
            "enum": self._enum,
            "uniqueItems": self._unique_items,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
        }

    def _finds(self, pattern: str, text: str) -> bool:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:  # which regex would take for no limit
            raise TimeoutError("the patterns take too long")
        return regex.search(pattern, text, timeout=left_s, concurrent=True) is not None

    def _enum(self, judge: Any, values: Any, value: Any, schema: Any) -> Iterator[Any]:
        if id(values) not in self._enums:  # a part of the schema, which outlives this
            self._enums[id(values)] = set(map(key_of, values))
        if key_of(value) not in self._enums[id(values)]:
            yield ValidationError("is none of the enum's values")

    def _unique_items(self, judge: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
        if wanted and isinstance(value, list) and len(set(map(key_of, value))) < len(value):
            yield ValidationError("holds a value twice")

    def _pattern(self, judge: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        if isinstance(value, str) and not self._finds(pattern, value):
            yield ValidationError(f"does not match {pattern!r}")

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


def _keys_of(schema: object) -> tuple[set[str], int]:
    """The keys of every object in it, at any depth, and how many name a draft by $schema."""
    keys: set[str] = set()
    drafts = 0
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            keys.update(item)
            drafts += isinstance(item.get("$schema"), str)
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return keys, drafts

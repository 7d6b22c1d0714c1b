"""Answers are held against their schema as jsonschema does it, but never for ever, nor online."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from enginehouse.server.tools.verdict import verdict_of

NESTED = r"^(a|a)+$"  # doubles the work with each letter
SCHEMAS: list[dict[str, Any]] = [
    {"pattern": "^a+$"},
    {"items": {"pattern": "b"}, "uniqueItems": True},
    {"patternProperties": {"^x": {"type": "integer"}, "y$": False}},
    {"properties": {"a": {}}, "patternProperties": {"^x": {}}, "additionalProperties": False},
    {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    {"properties": {"a": {}}, "unevaluatedProperties": False},
    {"propertyNames": {"pattern": "^[ax]"}},
]
VALUES: list[Any] = [
    "aaa",
    "b",
    7,
    ["b", "ab"],
    ["b", "b"],
    ["a"],
    {},
    {"a": 1},
    {"x": 1},
    {"x": "1", "a": 1},
    {"xy": 1},
    {"a": 1, "c": "c"},
    {"c": 1},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_a_verdict_is_jsonschema_s(schema: dict[str, Any]) -> None:
    for value in VALUES:
        wanted = "valid" if Draft202012Validator(schema).is_valid(value) else "invalid"
        assert verdict_of(schema, json.dumps(value)) == wanted, value
    assert verdict_of(schema, "[1,") == "invalid"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": {"pattern": NESTED}}, ["a" * 60 + "!"] * 1000),
        ({"patternProperties": {NESTED: {}}}, {"a" * 60 + "!": 1}),
        ({"patternProperties": {NESTED: {}}, "additionalProperties": False}, {"a" * 60 + "!": 1}),
        ({"patternProperties": {NESTED: {}}, "unevaluatedProperties": False}, {"a" * 60 + "!": 1}),
        ({"propertyNames": {"pattern": NESTED}}, {"a" * 60 + "!": 1}),
    ],
    ids=["pattern", "patternProperties", "additionalProperties", "unevaluated", "propertyNames"],
)
def test_a_pattern_that_backtracks_for_ever_is_given_up(schema: dict[str, Any], value: Any) -> None:
    started_s = time.monotonic()
    assert verdict_of(schema, json.dumps(value), limit_s=0.05) == "unknown"
    assert time.monotonic() - started_s < 5


def test_a_pattern_at_which_pythons_re_never_ends_is_judged() -> None:
    assert verdict_of({"pattern": "(a+)+$"}, json.dumps("a" * 60 + "b")) == "invalid"
    assert verdict_of({"pattern": "(a+)+$"}, json.dumps("b" + "a" * 60)) == "valid"


def test_what_cannot_be_read_is_unknown_and_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        assert verdict_of({"$ref": url}, "1") == "unknown"
        with pytest.raises(TimeoutError):
            server.accept()
    assert verdict_of({"pattern": "("}, '"a"') == "unknown"
    assert verdict_of({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "1") == "invalid"

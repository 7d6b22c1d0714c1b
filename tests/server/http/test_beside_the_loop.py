"""What may take seconds is not done on the event loop, however short the body that asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from enginehouse.server.http import service
from makers.api_client import HELLO, PATHS

SCHEMA = {"type": "object"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "beside"),
    [
        ({}, False),
        ({"temperature": 0, "user": "a"}, False),
        ({"user": "a" * 3000}, True),
        ({"response_format": FORM}, True),
        ({"tools": [TOOL], "tool_choice": "none"}, True),
        ({"guided_json": SCHEMA}, True),
        ({"guided_regex": "a+"}, True),
        ({"structured_outputs": {"json": SCHEMA}}, True),
        ({"regex": "a+"}, True),
        ({"ebnf": 'root ::= "a"'}, True),
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_a_body_that_may_hold_a_schema_is_parsed_beside_the_loop(
    http: FlaskClient,
    fields: dict[str, Any],
    beside: bool,
    escaped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []

    def call_beside_the_loop(work: Callable[[], Any]) -> Any:
        done.append(work)
        return work()

    monkeypatch.setattr(service, "call_beside_the_loop", call_beside_the_loop)
    text = json.dumps({**HELLO, **fields})
    if escaped and fields:
        name = next(iter(fields))
        text = text.replace(f'"{name}"', f'"\\u{ord(name[0]):04x}{name[1:]}"')
        beside = True
    answer = http.post(PATHS[0], data=text, content_type="application/json")
    assert answer.status_code == 200, answer.json
    assert len(done) == 2 * beside, "the body, then the plan of the answer"

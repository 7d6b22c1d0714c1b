"""A schema of which something cannot be enforced: named, and judged; when strict, refused."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from makers.text_engine import engine_info
from makers.token_outputs import STOP, tokens

UNIQUE = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
HELLO = {"model": "tiny/chat", "messages": [{"role": "user", "content": "Hello!"}]}


def asked(schema: Any, **more: Any) -> dict[str, Any]:
    inner = {"name": "x", "schema": schema, **more}
    return {**HELLO, "response_format": {"type": "json_schema", "json_schema": inner}}


def verdicts(http: FlaskClient) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("enginehouse_schema_verdicts_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "verdict"), [("[1, 2]", "valid"), ("[1, 1]", "invalid"), ("[1,", "invalid")]
)
def test_what_is_not_enforced_is_named_and_the_answer_is_judged(
    http: FlaskClient, engine: ScriptedClient, text: str, verdict: str, stream: bool
) -> None:
    engine.script = tokens(text, STOP)
    with http.post("/v1/chat/completions", json={**asked(UNIQUE), "stream": stream}) as response:
        assert response.status_code == 200 and response.data
    named = response.headers["X-Unenforced-Schema"]
    assert named == "response_format.json_schema.schema.uniqueItems"
    assert verdicts(http) == {verdict: 1}


def test_when_strict_it_is_refused_and_named(http: FlaskClient) -> None:
    response = http.post("/v1/chat/completions", json=asked(UNIQUE, strict=True))
    assert response.status_code == 400
    error = response.json["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert error["code"] == "invalid_value" and "uniqueItems" in error["message"]


def test_a_schema_that_is_enforced_whole_is_neither_named_nor_judged(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens("[1, 1]", STOP)
    schema = {"type": "array", "items": {"type": "integer", "format": "int32", "x-ui": 1}}
    response = http.post("/v1/chat/completions", json=asked(schema, strict=True))
    assert response.status_code == 200 and "X-Unenforced-Schema" not in response.headers
    assert verdicts(http) == {}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_json": UNIQUE}, "guided_json.uniqueItems"),
        ({"structured_outputs": {"json": UNIQUE}}, "structured_outputs.json.uniqueItems"),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "format": {"type": "json_schema", "json_schema": UNIQUE},
                }
            },
            "response_format.schema.uniqueItems",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": UNIQUE}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools[0].function.parameters.properties.a.uniqueItems",
        ),
    ],
    ids=["guided", "vllm", "tag", "tool"],
)
def test_every_place_of_a_schema_names_what_is_left_out(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], named: str
) -> None:
    engine.info = engine_info(1024)
    response = http.post("/v1/chat/completions", json={**HELLO, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["X-Unenforced-Schema"] == named

"""Tools and reasoning through the routes: what is read, what is refused, what is counted."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import ask, data_of
from makers.text_engine import engine_info
from makers.token_outputs import LENGTH, STOP, tokens

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = '{"name": "f", "arguments": {"a": "b"}}'
UNKNOWN = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def told(response: Any) -> tuple[str, str, list[str], str]:
    """Reasoning, content, the arguments of calls and the reason: of a stream too."""
    thought, content, calls, reason = "", "", [], ""
    streamed = response.mimetype == "text/event-stream"
    for event in data_of([response.data]) if streamed else [response.json]:
        if event == "[DONE]":
            continue
        [choice] = event["choices"]
        part = choice["delta"] if streamed else choice["message"]
        thought += part.get("reasoning_content") or ""
        content += part.get("content") or ""
        reason = choice["finish_reason"] or reason
        for call in part.get("tool_calls", []):
            if "name" in call["function"]:
                calls.append("")
            calls[-1] += call["function"]["arguments"]
    return thought, content, calls, reason


@pytest.fixture(autouse=True)
def long_context(engine: ScriptedClient) -> None:
    engine.info = engine_info(max_seq_len=200_000)


@pytest.fixture
def thinking(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    return create_app(dataclasses.replace(settings, reasoning_format="think"), engine).test_client()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "thought", "content"),
    [
        ({}, "hm", "Yes."),
        ({"include_reasoning": False}, "", "Yes."),
        ({"separate_reasoning": False}, "", "<think>hm</think>\nYes."),
    ],
    ids=str,
)
def test_reasoning_is_told_apart_left_out_or_left_in(
    thinking: FlaskClient,
    engine: ScriptedClient,
    fields: dict[str, Any],
    thought: str,
    content: str,
    stream: bool,
) -> None:
    engine.script = tokens("<think>hm</think>\nYes.", STOP)
    with ask(thinking, stream=stream, **fields) as response:
        assert told(response) == (thought, content, [], "stop")
    engine.script = tokens(f"<think>hm</think>\n{CALL}", STOP)
    with ask(thinking, stream=stream, tools=TOOLS, **fields) as response:
        left_in = "<think>hm</think>" if content.startswith("<") else ""
        assert told(response) == (thought, left_in, ['{"a": "b"}'], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (CALL, STOP, "tool_calls"),
        (CALL, LENGTH, "length"),
        (CALL[:-5], STOP, "stop"),
        (CALL[:-5], LENGTH, "length"),
    ],
)
def test_only_whole_calls_end_an_answer_as_calls(
    http: FlaskClient, engine: ScriptedClient, stream: bool, text: str, finish: Any, reason: str
) -> None:
    engine.script = tokens(text, finish)
    with ask(http, stream=stream, tools=TOOLS) as response:
        _, content, [arguments], found = told(response)
    assert (content, found) == ("", reason)
    assert '{"a": "b"}'.startswith(arguments)


def test_what_only_looks_like_a_call_is_content_and_counted(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    def count() -> float:
        page = http.get("/metrics").get_data(as_text=True)
        found = re.search(r"^enginehouse_tool_call_failures_total (\S+)$", page, re.MULTILINE)
        assert found
        return float(found[1])

    before, text = count(), CALL.replace('"f"', '"g"')
    engine.script = tokens(text, STOP)
    with ask(http, tools=TOOLS) as response:
        assert told(response) == ("", text, [], "stop")
    assert count() == before + 1
    with ask(http, tools=TOOLS, stream=True) as response:
        assert told(response)[1] == text
    assert count() == before + 2


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tools[1].function.parameters"),
        ({"tool_choice": named("bad")}, "tools[1].function.parameters"),
        ({"response_format": {"type": "json_object"}}, "tools[1].function.parameters"),
        ({"tool_choice": named("nobody")}, "tool_choice.function.name"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused_at_its_place(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], param: str
) -> None:
    function = {"name": "bad", "parameters": UNKNOWN, "strict": True}
    response = ask(http, tools=[*TOOLS, {"type": "function", "function": function}], **fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")
    assert engine.submitted == []


def test_a_schema_that_is_only_shown_may_say_anything(http: FlaskClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": UNKNOWN}}
    assert ask(http, tools=[tool]).status_code == 200
    tool["function"]["strict"] = True  # type: ignore[index]
    error = ask(http, tools=[tool]).json["error"]
    assert error["param"] == "tools[0].function.parameters"


def test_more_schemas_than_a_grammar_holds_are_refused(http: FlaskClient) -> None:
    parameters = {"properties": {"a": {"type": "string"}}, "description": "x" * 3000}
    many = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}}
        for i in range(25)
    ]
    error = ask(http, tools=many, tool_choice="required").json["error"]
    assert (error["param"], error["code"]) == ("tools", "invalid_value")
    assert "65536" in error["message"]

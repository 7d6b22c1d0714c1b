"""POST /v1/messages against the schema that llm-comply brings, and Anthropic's own client."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import gevent
import pytest
from flask.testing import FlaskClient
from llm_comply.result import TestStatus as Status
from llm_comply.tests.anthropic import ANTHROPIC_TESTS

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import HostUnavailable
from enginehouse.server.answer.framing import KEEPALIVE
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.judges import judged, served, specification
from makers.text_engine import engine_info
from makers.token_outputs import LENGTH, STOP, TOKENIZER, tokens

pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver:DeprecationWarning")

MODEL = "tiny-claude-4"  # of models without such a name its check of thinking asks nothing
PATH = "/v1/messages"
SPEC = specification("anthropic")
THOUGHT = "<think>hm</think>Hello!"
CALL = '{"name": "get_weather", "arguments": {"location": "SF"}}'
SCHEMA = {"type": "object", "properties": {"location": {"type": "string"}}}
TOOLS = [{"name": "get_weather", "input_schema": SCHEMA}]
HELLO = {"model": MODEL, "max_tokens": 99, "messages": [{"role": "user", "content": "hello"}]}
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
REFUSED = {"anth-image-input": "HTTP 400 (expected [200])"}  # the engine reads text only


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    engine.info = engine_info(max_seq_len=100_000)
    given = dataclasses.replace(settings, model_name=MODEL, reasoning_format="think")
    return create_app(given, engine).test_client()


@pytest.fixture
def url(http: FlaskClient) -> Iterator[str]:
    with served(http) as address:
        yield address


def ask(http: FlaskClient, **fields: Any) -> Any:
    return http.post(PATH, json={**HELLO, **fields})


def events_of(data: bytes) -> list[dict[str, Any]]:
    *frames, rest = data.decode().split("\n\n")
    assert rest == ""
    events = []
    for frame in frames:
        name, text = frame.split("\n")
        events.append(json.loads(text.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def prompt_of(engine: ScriptedClient) -> str:
    text: str = TOKENIZER.decode(engine.submitted[-1][0], skip_special_tokens=False)
    return text


@pytest.mark.parametrize("case", ANTHROPIC_TESTS, ids=lambda case: str(case.id))
def test_a_check_passes_or_is_refused_for_a_reason(
    url: str, engine: ScriptedClient, case: Any
) -> None:
    engine.script = tokens(CALL if case.id == "anth-tool-calling" else THOUGHT, STOP)
    result = judged(url, MODEL, case, SPEC)
    if case.id in REFUSED:
        assert result.status is Status.FAILED and result.errors[0] == REFUSED[case.id]
    else:
        assert (result.status, result.errors) == (Status.PASSED, [])
    assert result.warnings == []


ANSWERS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "text": (tokens("the lazy dog", STOP), {}, "end_turn"),
    "nothing": (tokens("", STOP), {}, "end_turn"),
    "thought": (tokens(THOUGHT, STOP), THINKS, "end_turn"),
    "hidden thought": (tokens(THOUGHT, STOP), {}, "end_turn"),
    "cut": (tokens("the lazy", LENGTH), {"max_tokens": 2}, "max_tokens"),
    "context": (tokens("the", LENGTH), {}, "model_context_window_exceeded"),
    "stopped": (tokens("the lazy dog", STOP), {"stop_sequences": [" dog"]}, "stop_sequence"),
    "call": (
        tokens(f"<think>hm</think>Now:\n{CALL}", STOP),
        {"tools": TOOLS, **THINKS},
        "tool_use",
    ),
    "calls": (tokens(f"{CALL}\n{CALL}", STOP), {"tools": TOOLS}, "tool_use"),
    "cut call": (
        tokens(CALL[:50], LENGTH),
        {"tools": TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 1},
        "max_tokens",
    ),
}


@pytest.mark.parametrize(("script", "fields", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_a_stream_adds_up_to_the_whole_answer(
    http: FlaskClient,
    engine: ScriptedClient,
    script: list[Any],
    fields: dict[str, Any],
    reason: str,
) -> None:
    engine.script = script
    whole = ask(http, **fields).json
    assert SPEC.validate(whole, "Message") == []
    assert whole["stop_reason"] == reason
    engine.script = script
    first, ping, *events = events_of(ask(http, **fields, stream=True).data)
    assert (first["type"], ping) == ("message_start", {"type": "ping"})
    for event in (first, *events):
        name = "".join(word.title() for word in event["type"].split("_")) + "Event"
        assert SPEC.validate(event, name) == []
    assert first["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    blocks = _added_up(events)
    assert [_without_id(block) for block in blocks] == [_without_id(b) for b in whole["content"]]
    *_, last, stop = events
    assert {**last["delta"], "usage": last["usage"]}.items() <= {
        **whole,
        "usage": {name: whole["usage"][name] for name in last["usage"]},
    }.items()
    assert stop == {"type": "message_stop"}


def _without_id(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "id"}


def _added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as a client puts them together from deltas alone."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            arguments = ""
        elif event["type"] == "content_block_delta":
            kind, delta = event["delta"]["type"].removesuffix("_delta"), event["delta"]
            if kind == "input_json":
                arguments += delta["partial_json"]
            else:
                blocks[event["index"]][kind] += delta[kind]
        elif event["type"] == "content_block_stop" and arguments:
            try:
                blocks[-1]["input"] = json.loads(arguments)
            except ValueError:
                pass  # it was cut
    return blocks


def test_what_is_asked_reaches_the_engine(http: FlaskClient, engine: ScriptedClient) -> None:
    ask(http, temperature=0.5, top_p=0.9, top_k=7, system=[{"type": "text", "text": "Be kind."}])
    [sampling] = engine.submitted[-1][1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert sampling.max_tokens == 99 and "Be kind." in prompt_of(engine)


def test_a_conversation_is_the_one_that_chat_makes_of_it(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"location": "a"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "warm", **cached}
    words = {"type": "text", "text": "and?"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "hi", **cached}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result, words]},
    ]
    response = ask(http, messages=turns, system="Be kind.", tools=TOOLS)
    assert response.status_code == 200
    assert response.headers.get("X-Ignored-Fields") is None
    asked = prompt_of(engine)
    function = {"name": "get_weather", "arguments": {"location": "a"}}
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "warm"},
        {"role": "user", "content": "and?"},
    ]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    body = {"model": MODEL, "messages": chat, "tools": tools, "reasoning_effort": "none"}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert prompt_of(engine) == asked
    failed = {**result, "is_error": True}
    ask(http, messages=[*turns[:2], {"role": "user", "content": [failed]}], tools=TOOLS)
    assert "Error: warm" in prompt_of(engine)


def test_an_assistants_last_words_are_gone_on_with(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    turns = [*HELLO["messages"], {"role": "assistant", "content": "The answer is"}]
    ask(http, messages=turns)
    assert prompt_of(engine).endswith("The answer is")


def test_tokens_are_counted_as_they_are_when_it_is_asked(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    fields = {"system": "Be kind.", "tools": TOOLS}
    num_input = ask(http, **fields).json["usage"]["input_tokens"]
    body = {name: value for name, value in {**HELLO, **fields}.items() if name != "max_tokens"}
    response = http.post(f"{PATH}/count_tokens", json=body)
    assert (
        response.json
        == {"input_tokens": num_input}
        == {"input_tokens": len(engine.submitted[-1][0])}
    )


REFUSALS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type: ",
    ),
    "a server tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        400,
        "invalid_request_error",
        "tools[0].type: ",
    ),
    "two tools of a name": ({"tools": TOOLS * 2}, 400, "invalid_request_error", "tools[1].name: "),
    "an unknown tool": (
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}},
        400,
        "invalid_request_error",
        "tool_choice.name: ",
    ),
    "a tool without a name": (
        {"tools": TOOLS, "tool_choice": {"type": "tool"}},
        400,
        "invalid_request_error",
        "tool_choice.name: ",
    ),
    "temperature": ({"temperature": 1.5}, 400, "invalid_request_error", "temperature: "),
    "a result of the assistant": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}],
                }
            ]
        },
        400,
        "invalid_request_error",
        "messages[0].content[0].type: ",
    ),
    "a text without its text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].text: missing",
    ),
    "no max_tokens": (
        {"max_tokens": None},
        400,
        "invalid_request_error",
        "max_tokens: missing; wanted an integer",
    ),
    "a system that is none": (
        {"system": 5},
        400,
        "invalid_request_error",
        "system: found 5; wanted a string or a list of text blocks",
    ),
    "a call of the user": (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "f"}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type: ",
    ),
    "a schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "y"}}}},
        400,
        "invalid_request_error",
        "output_config.format.schema",
    ),
    "another model": ({"model": "claude-x"}, 404, "not_found_error", "the model"),
}


@pytest.mark.parametrize(("fields", "status", "kind", "beginning"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_has_anthropics_shape(
    http: FlaskClient, fields: dict[str, Any], status: int, kind: str, beginning: str
) -> None:
    response = ask(http, **fields)
    told = response.json
    assert (response.status_code, told["type"], told["error"]["type"]) == (status, "error", kind)
    assert told["error"]["message"].startswith(beginning)
    assert told["request_id"] == response.headers["X-Request-Id"] == response.headers["request-id"]


def test_a_thread_is_refused_as_tool_runners_understand_it(http: FlaskClient) -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        told = ask(http, thread=thread).json["error"]
        assert told["details"] == {"error_code": "thread_unsupported_request"}
    assert "details" not in ask(http, container="c").json["error"]


def test_every_failure_has_anthropics_shape(http: FlaskClient, engine: ScriptedClient) -> None:
    assert http.get(PATH).json["error"]["type"] == "invalid_request_error"
    assert http.post(f"{PATH}/none", json={}).json["error"]["type"] == "not_found_error"
    engine.ready = False
    response = ask(http)
    assert (response.status_code, response.json["error"]["type"]) == (503, "overloaded_error")


def test_an_error_in_mid_stream_is_an_event(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [*tokens("a"), HostUnavailable("it stopped")]
    last = events_of(ask(http, stream=True).data)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


def test_silence_is_a_ping(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [*tokens("a"), None, *tokens("b", STOP)]
    data = ask(http, stream=True).data
    assert KEEPALIVE not in data
    assert [event["type"] for event in events_of(data)].count("ping") == 2


def test_anthropics_client_reads_answers_streams_and_runs_tools(
    url: str, engine: ScriptedClient
) -> None:
    @anthropic.beta_tool
    def get_weather(location: str) -> str:
        """The weather there.

        Args:
            location: where.
        """
        engine.script = tokens(f"warm in {location}", STOP)
        return "warm"

    def run() -> None:
        messages: Any = HELLO["messages"]
        with anthropic.Anthropic(base_url=url, api_key="-", max_retries=0) as client:
            engine.script = tokens("the lazy dog", STOP)
            told = client.messages.create(model=MODEL, max_tokens=9, messages=messages)
            assert told.content[0].type == "text" and told.content[0].text == "the lazy dog"
            engine.script = tokens(CALL, STOP)
            tools: Any = TOOLS
            with client.messages.stream(
                model=MODEL, max_tokens=99, messages=messages, tools=tools
            ) as stream:
                [call] = stream.get_final_message().content
            assert call.type == "tool_use" and call.input == {"location": "SF"}
            counted = client.messages.count_tokens(model=MODEL, messages=messages)
            assert counted.input_tokens > 0
            with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
                client.messages.create(model=MODEL, max_tokens=0, messages=messages)
            engine.script = tokens(CALL, STOP)
            last = client.beta.messages.tool_runner(
                model=MODEL, max_tokens=99, messages=messages, tools=[get_weather]
            ).until_done()
            assert last.content[0].type == "text" and last.content[0].text == "warm in SF"
            asked = prompt_of(engine)  # of the last turn: all that was said before
            assert HELLO["messages"][0]["content"] in asked and "get_weather" in asked

    gevent.get_hub().threadpool.spawn(run).get(timeout=60)


@pytest.mark.parametrize("name", ["stop", "colour"])
def test_a_field_that_nobody_knows_is_refused_by_the_name_that_it_came_by(
    http: FlaskClient, name: str
) -> None:
    response = ask(http, strict_fields=True, **{name: ["a"]})
    assert response.status_code == 400
    assert response.json["error"]["message"].startswith(f"{name}: nobody knows this field")

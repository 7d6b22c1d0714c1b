"""POST /v1/responses against the specifications that llm-comply brings, and OpenAI's own client."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import gevent
import openai
import pytest
from flask.testing import FlaskClient
from llm_comply.result import TestStatus as Status
from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.judges import judged, served, specification
from makers.text_engine import engine_info
from makers.token_outputs import LENGTH, STOP, bytes_ids, scored, tokens

pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver:DeprecationWarning")

MODEL = "tiny-deepseek-r1"  # of models without such a name its check of reasoning asks nothing
PATH = "/v1/responses"
SPEC = specification("openresponses")
THOUGHT = "<think>hm</think>Hello!"
CALL = '{"name": "get_weather", "arguments": {"location": "SF"}}'
SCHEMA = {"type": "object", "properties": {"location": {"type": "string"}}}
TOOLS = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]
REFUSED = {"image-input": "HTTP 400 (expected [200])"}  # the engine reads text only
# It asks there too, and is told that there is no such path.
REMARKS = {
    "compact-response": [
        "response.output is missing or empty",
        "expected object containing 'compact', got ''",
        "no output item with type='compaction' (found: [])",
    ]
}


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    engine.info = engine_info(max_seq_len=100_000)
    given = dataclasses.replace(settings, model_name=MODEL, reasoning_format="think")
    return create_app(given, engine).test_client()


@pytest.fixture
def url(http: FlaskClient) -> Iterator[str]:
    with served(http) as address:
        yield address


def events_of(data: bytes) -> list[dict[str, Any]]:
    """Each event's object; its name is the object's type, and [DONE] is the last."""
    *frames, end, rest = data.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        name, text = frame.split("\n")
        events.append(json.loads(text.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def ask(http: FlaskClient, **fields: Any) -> Any:
    return http.post(PATH, json={"model": MODEL, "input": "hello", **fields})


@pytest.mark.parametrize("case", OPEN_RESPONSES_TESTS, ids=lambda case: str(case.id))
def test_a_check_passes_or_is_refused_for_a_reason(
    url: str, engine: ScriptedClient, case: Any
) -> None:
    thinks = case.id == "reasoning-summary"
    engine.script = tokens(CALL if case.id == "tool-calling" else THOUGHT if thinks else "Hi", STOP)
    result = judged(url, MODEL, case, SPEC)
    if case.id in REFUSED:
        assert result.status is Status.FAILED and result.errors[0] == REFUSED[case.id]
    else:
        assert (result.status, result.errors) == (Status.PASSED, [])
    assert result.warnings == REMARKS.get(case.id, [])


ANSWERS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "text": (tokens("the lazy dog", STOP), {}),
    "nothing": (tokens("", STOP), {}),
    "thought": (tokens(THOUGHT, STOP), {}),
    "only thought": (tokens("<think>hm", LENGTH), {}),
    "cut": (tokens("the lazy", LENGTH), {"max_output_tokens": 9}),
    "call": (tokens(f"<think>hm</think>Now:\n{CALL}", STOP), {"tools": TOOLS}),
    "calls": (tokens(f"{CALL}\n{CALL}", STOP), {"tools": TOOLS}),
    "cut call": (tokens(CALL[:50], LENGTH), {"tools": TOOLS, "tool_choice": "required"}),
}


@pytest.mark.parametrize(("script", "fields"), ANSWERS.values(), ids=ANSWERS)
def test_a_stream_adds_up_to_the_whole_answer(
    http: FlaskClient,
    engine: ScriptedClient,
    script: list[Any],
    fields: dict[str, Any],
) -> None:
    engine.script = script
    whole = ask(http, **fields).json
    assert SPEC.validate(whole, "ResponseResource") == []
    engine.script = script
    events = events_of(ask(http, **fields, stream=True).data)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    for event in events:
        if not event["type"].startswith("response.reasoning_text"):  # OpenAI's, not this one's
            assert SPEC.validate_sse_event(event["type"], event) == []
    assert _without_ids(last["response"]) == _without_ids(whole)
    assert _added_up(events) == last["response"]["output"]


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        names = {"id", "call_id", "created_at", "completed_at"}
        return {key: _without_ids(item) for key, item in value.items() if key not in names}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def _added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client puts it together from deltas alone."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append({**event["item"]})
        elif kind == "response.content_part.added":
            items[event["output_index"]]["content"] = [{**event["part"]}]
        elif kind.endswith("_text.delta"):
            items[event["output_index"]]["content"][0]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "response.output_item.done":
            items[event["output_index"]]["status"] = event["item"]["status"]
            assert items[event["output_index"]] == event["item"]
        if "item_id" in event:
            assert items[event["output_index"]]["id"] == event["item_id"]
    return items


def test_what_is_asked_reaches_the_engine_and_is_told_again(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_output_tokens": 11}
    told = ask(http, **fields, instructions="Be kind.", metadata={"a": "b"}, user="me").json
    [(prompt, [sampling])] = engine.submitted
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.seed, sampling.max_tokens) == (3, 11)
    names = ("temperature", "top_p", "max_output_tokens", "instructions", "metadata", "user")
    assert [told[name] for name in names] == [0.5, 0.9, 11, "Be kind.", {"a": "b"}, "me"]
    assert told["usage"]["input_tokens"] == len(prompt)
    assert told["usage"]["estimated_cost"] > 0


def test_log_probabilities_are_told_with_their_text(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    script = [*(scored([token_id]) for token_id in bytes_ids("a b")), scored([], STOP)]
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    engine.script = script
    whole = ask(http, **fields).json
    told = whole["output"][0]["content"][0]["logprobs"]
    assert len(told) == 3 and SPEC.validate(whole, "ResponseResource") == []
    engine.script = script
    events = events_of(ask(http, **fields, stream=True).data)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == told
    [added] = [event for event in events if event["type"] == "response.content_part.added"]
    assert added["part"]["logprobs"] == []


def test_a_thoughts_tokens_are_counted(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = tokens(THOUGHT, STOP)
    usage = ask(http).json["usage"]
    num_thought = usage["output_tokens_details"]["reasoning_tokens"]
    assert 0 < num_thought < usage["output_tokens"]
    engine.script = tokens("Hello!", STOP)
    assert ask(http).json["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


def test_an_error_in_mid_stream_is_told_by_events(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [*tokens("a"), ZeroDivisionError("secret")]
    data = ask(http, stream=True).data
    *_, error, failed = events_of(data)
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert failed["response"]["status"] == "failed" and b"secret" not in data
    assert failed["response"]["error"]["message"] == error["message"]
    kept = http.get(f"{PATH}/{failed['response']['id']}").json
    assert kept == failed["response"]


def test_openais_client_reads_answers_streams_and_parses(url: str, engine: ScriptedClient) -> None:
    def run() -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            engine.script = tokens("the lazy dog", STOP)
            assert client.responses.create(model=MODEL, input="hi").output_text == "the lazy dog"
            engine.script = tokens(CALL, STOP)
            tools: Any = TOOLS
            with client.responses.stream(model=MODEL, input="hi", tools=tools) as stream:
                kinds = [event.type for event in stream]
                [call] = stream.get_final_response().output
            assert kinds[-1] == "response.completed"
            assert call.type == "function_call" and json.loads(call.arguments) == {"location": "SF"}

    gevent.get_hub().threadpool.spawn(run).get(timeout=60)

"""Every object that is sent is one of OpenAI's, by the types of its own package, strictly read.

The package itself constructs its objects without a check. Here they are validated: required fields,
types and literals; and what they do not know must be in a short list of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from flask.testing import FlaskClient
from openai.pagination import SyncPage
from openai.types import Completion, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter, ValidationError

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import HostUnavailable
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS, data_of
from makers.text_engine import engine_info
from makers.token_outputs import LENGTH, STOP, bytes_ids, scored

# What is not OpenAI's: vLLM's and SGLang's fields, and the product page's cost.
OURS = {
    "choices[].stop_reason",
    "choices[].message.reasoning_content",
    "choices[].delta.reasoning_content",
    "usage.estimated_cost",
    "max_model_len",
    "quantization",
    "root",
    "parent",
    "permission",
    "data[].max_model_len",
    "data[].quantization",
    "data[].root",
    "data[].parent",
    "data[].permission",
}
CHAT, TEXTS = PATHS[0], "/v1/completions"
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = '<think>hm</think>{"name": "f", "arguments": {"a": "b"}}'
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
EVERYTHING = {
    "n": 3,
    "seed": 7,
    "stop": ["!"],
    "tools": TOOLS,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": FORMAT,
    "temperature": 0.5,
}


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    """A model that reasons; of three choices one calls, one is stopped and one is cut."""
    texts = [(CALL, STOP), ("a🙂b!c", STOP), ("a long", LENGTH)]
    engine.info = engine_info(max_seq_len=100_000)
    engine.script = [
        item
        for index, (text, finish) in enumerate(texts)
        for item in (
            *(scored([i], index=index) for i in bytes_ids(text)),
            scored([], finish, index),
        )
    ]
    return create_app(dataclasses.replace(settings, reasoning_format="think"), engine).test_client()


def check(kind: Any, body: object) -> None:
    """It is strictly of that kind, and knows no field that is neither OpenAI's nor in OURS."""
    assert set(unknown(adapter(kind).validate_python(body, strict=True))) <= OURS


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def unknown(value: object, path: str = "") -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{path}.{name}".lstrip(".") for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name), f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from unknown(item, f"{path}[]")


def streamed(http: FlaskClient, path: str, **fields: Any) -> list[Any]:
    with http.post(path, json={**HELLO, **fields}) as response:
        assert response.status_code == 200, response.text
        *chunks, done = data_of([response.data])
    assert done == "[DONE]"
    return chunks


@pytest.mark.parametrize(
    "broken",
    [
        {"choices": None},
        {"created": "now"},
        {"object": "chat.completion.chunk"},
        {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_the_check_itself_finds_what_is_wrong(http: FlaskClient, broken: dict[str, Any]) -> None:
    whole = http.post(CHAT, json=HELLO).json
    check(ChatCompletion, whole)
    with pytest.raises((ValidationError, AssertionError)):
        check(ChatCompletion, {**whole, **broken})


WHOLE: list[dict[str, Any]] = [
    {},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "required", "include_reasoning": False},
    {"separate_reasoning": False},
    {"response_format": FORMAT},
    {"max_tokens": 0},
    EVERYTHING,
]


@pytest.mark.parametrize("fields", WHOLE, ids=str)
def test_a_chat_completion_is_openai_s(http: FlaskClient, fields: dict[str, Any]) -> None:
    body = http.post(CHAT, json={**HELLO, **fields}).json
    check(ChatCompletion, body)
    for choice in body["choices"]:  # what the published schema wants, where the types do not
        assert choice.keys() >= {"logprobs"}
        assert choice["message"].keys() >= {"content", "refusal", "annotations"}
        assert choice["logprobs"] is None or choice["logprobs"].keys() == {"content", "refusal"}


@pytest.mark.parametrize("fields", WHOLE, ids=str)
def test_every_chunk_of_a_chat_is_openai_s(http: FlaskClient, fields: dict[str, Any]) -> None:
    with_usage: dict[str, Any] = {}
    for option in ("include_obfuscation", "include_usage", "continuous_usage_stats"):
        chunks = streamed(http, CHAT, stream=True, stream_options={option: True}, **fields)
        for chunk in chunks:
            check(ChatCompletionChunk, chunk)
            assert all("finish_reason" in choice for choice in chunk["choices"])
        with_usage[option] = [chunk.get("usage", "absent") is not None for chunk in chunks]
        named = {"usage" in chunk for chunk in chunks}
        assert named == {option != "include_obfuscation"}
        assert (chunks[-1]["choices"] == []) == (option == "include_usage")
    assert with_usage["include_usage"][:-1].count(True) == 0 and with_usage["include_usage"][-1]
    assert all(with_usage["continuous_usage_stats"])


TEXT_FIELDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"echo": True},
    {"prompt": ["hello", "dog"], "n": 3, "stop": "!", "seed": 7, "logprobs": 1},
    {"max_tokens": 0},
]


@pytest.mark.parametrize("fields", TEXT_FIELDS, ids=str)
def test_a_text_completion_and_its_chunks_are_openai_s(
    http: FlaskClient, fields: dict[str, Any]
) -> None:
    body = {"model": "tiny/chat", "prompt": "hello", "max_tokens": 100, **fields}
    whole = http.post(TEXTS, json=body).json
    check(Completion, whole)
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(whole["choices"])))
    with http.post(TEXTS, json={**body, **USAGE}) as response:
        *chunks, _ = data_of([response.data])
    for chunk in chunks:
        # OpenAI's chunks say null until the last; the package's type is of whole answers
        reasons = [choice["finish_reason"] for choice in chunk["choices"]]
        ended = [
            {**item, "finish_reason": item["finish_reason"] or "stop"} for item in chunk["choices"]
        ]
        assert set(reasons) <= {None, "stop", "length"}
        check(Completion, {**chunk, "choices": ended})
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []


def test_with_everything_asked_for_at_once_a_stream_says_what_the_answer_says(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    whole = http.post(CHAT, json={**HELLO, **EVERYTHING}).json
    reasons = [choice["finish_reason"] for choice in whole["choices"]]
    assert reasons == ["tool_calls", "stop", "length"]
    contents = [choice["message"]["content"] for choice in whole["choices"]]
    assert contents == [None, "a🙂b", "a long"]
    chunks = streamed(http, CHAT, **EVERYTHING, **USAGE)
    for index, choice in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        message = choice["message"]
        told = "".join(part["delta"].get("content") or "" for part in parts)
        assert told == (message["content"] or "")
        thought = "".join(part["delta"].get("reasoning_content", "") for part in parts)
        assert thought == message.get("reasoning_content", "")
        calls = [call for part in parts for call in part["delta"].get("tool_calls", ())]
        arguments = "".join(call["function"]["arguments"] for call in calls)
        wanted = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        assert arguments == "".join(wanted) and len(wanted) == (index == 0)
        scores = [
            each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]
        ]
        assert scores == choice["logprobs"]["content"] != []
        ends = [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert ends == [choice["finish_reason"]] and parts[-1]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["system_fingerprint"] == chunks[0]["system_fingerprint"]
    assert [sampling.seed for sampling in engine.submitted[0][1]] == [7, 8, 9]


def test_models_are_openai_s(http: FlaskClient) -> None:
    check(SyncPage[Model], http.get("/v1/models").json)
    check(Model, http.get("/v1/models/tiny/chat").json)


def test_every_error_is_openai_s(http: FlaskClient, engine: ScriptedClient) -> None:
    script = engine.script
    engine.script = [HostUnavailable("it is gone")]
    responses = [http.post(CHAT, json=HELLO)]
    engine.script = [ZeroDivisionError("a bug")]
    responses.append(http.post(CHAT, json=HELLO))
    responses += [
        http.post(CHAT, json={**HELLO, "temperature": 3}),
        http.post(CHAT, json={"messages": []}),
        http.post(CHAT, data="{}"),
        http.post(CHAT, json={**HELLO, "model": "gpt"}),
        http.get("/nowhere"),
        http.get(CHAT),
    ]
    assert {response.status_code for response in responses} == {400, 404, 405, 415, 500, 503}
    engine.script = [*script[:4], HostUnavailable("it is gone")]
    *_, failed = streamed(http, CHAT, stream=True)
    for body in (failed, *(response.json for response in responses)):
        assert body.keys() == {"error"}
        check(ErrorObject, body["error"])

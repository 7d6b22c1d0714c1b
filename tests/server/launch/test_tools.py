"""Tools over HTTP: gunicorn, a tiny model of random weights, and OpenAI's own client.

Nothing is taught here: whatever the model would say, required and named calls are valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from makers.gunicorn_server import Server
from makers.openai_tools import SCHEMAS, TOOLS, joined, named

QUESTION = {"role": "user", "content": "What is the time?"}
SEEDS = range(2)


@pytest.fixture(scope="module", params=["json", "hermes"])
def server(
    engine: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ENGINEHOUSE_TOOL_FORMAT", request.param)
        environment.setenv("ENGINEHOUSE_DETERMINISTIC", "1")
        running = Server(engine, tmp_path_factory.mktemp("gunicorn") / "log")
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "tiny-llama", "messages": [QUESTION], "tools": TOOLS, "max_tokens": 300}
    return client.chat.completions.create(**{**asked, **fields})


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def check_call(name: str, arguments: str) -> None:
    Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))


@pytest.mark.parametrize("choice", ["required", named("get_time"), named("get_weather")], ids=str)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_valid_and_a_stream_says_the_same(
    client: openai.OpenAI, choice: Any, parallel: bool
) -> None:
    for seed in SEEDS:
        fields = {"tool_choice": choice, "parallel_tool_calls": parallel, "seed": seed}
        [plain] = create(client, **fields).choices
        calls = calls_of(plain.message)
        assert plain.message.content is None and calls
        if isinstance(choice, dict):
            assert [name for name, _ in calls] == [choice["function"]["name"]]
        elif not parallel:
            assert len(calls) == 1
        assert plain.finish_reason in ("tool_calls", "length")
        whole = calls if plain.finish_reason == "tool_calls" else calls[:-1]
        for name, arguments in whole:
            check_call(name, arguments)
        if not parallel or isinstance(choice, dict):
            assert plain.finish_reason == "tool_calls", calls
        streamed = joined(create(client, **fields, stream=True))
        assert streamed == [("", calls, plain.finish_reason, [])]


def test_calls_and_their_results_are_replayed(client: openai.OpenAI) -> None:
    first = create(client, tool_choice="required", parallel_tool_calls=False, seed=1)
    message = first.choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "ten past seven"}
    second = create(
        client, messages=[QUESTION, message, result], tool_choice="none", max_tokens=5, seed=1
    )
    assert not second.choices[0].message.tool_calls
    without = create(client, tool_choice="none", max_tokens=5, seed=1)
    assert second.usage.prompt_tokens > without.usage.prompt_tokens


def test_tools_go_with_n_logprobs_stop_and_usage(client: openai.OpenAI) -> None:
    fields = {
        "tool_choice": named("get_weather"),
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["\u2603"],
        "seed": 7,
    }
    plain = create(client, **fields)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(client, **fields, **options)
    assert last.choices == [] and last.usage.total_tokens == plain.usage.total_tokens
    assert len({tuple(calls_of(choice.message)) for choice in plain.choices}) > 1
    num_told = 0
    for choice, streamed in zip(plain.choices, joined(chunks, 3), strict=True):
        [(name, arguments)] = calls_of(choice.message)
        check_call(name, arguments)
        assert streamed[:3] == ("", [(name, arguments)], "tool_calls")
        written = b"".join(bytes(item.bytes) for item in choice.logprobs.content).decode()
        assert name in written and arguments in written
        assert all(len(item.top_logprobs) == 2 for item in choice.logprobs.content)
        assert [item.token for item in streamed[3]] == [
            item.token for item in choice.logprobs.content
        ]
        num_told += len(choice.logprobs.content)
    assert num_told == plain.usage.completion_tokens


def test_a_stop_string_within_a_call_leaves_it_unfinished(client: openai.OpenAI) -> None:
    fields = {"tool_choice": named("get_weather"), "stop": ["unit"], "seed": 2}
    [plain] = create(client, **fields).choices
    [(name, arguments)] = calls_of(plain.message)
    assert (plain.finish_reason, plain.stop_reason) == ("stop", "unit")
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    assert joined(create(client, **fields, stream=True)) == [("", [(name, arguments)], "stop", [])]


def test_a_call_that_max_tokens_cuts_says_length(client: openai.OpenAI) -> None:
    fields = {"tool_choice": named("get_weather"), "seed": 2}
    [whole] = create(client, **fields, logprobs=True).choices
    num_tokens = len(whole.logprobs.content)
    for max_tokens in (1, num_tokens // 2, num_tokens - 3):
        [cut] = create(client, **fields, max_tokens=max_tokens).choices
        assert cut.finish_reason == "length"
        for part, full in zip(calls_of(cut.message), calls_of(whole.message), strict=False):
            assert full[0] == part[0] and full[1].startswith(part[1])
        [streamed] = joined(create(client, **fields, max_tokens=max_tokens, stream=True))
        assert streamed[:3] == (cut.message.content or "", calls_of(cut.message), "length")


def test_auto_is_free_and_beside_a_grammar_either_or(client: openai.OpenAI) -> None:
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    [free] = create(client, tools=strict, max_tokens=20, seed=3).choices
    for name, arguments in calls_of(free.message)[:-1]:
        check_call(name, arguments)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in SEEDS:
        [choice] = create(client, response_format=wanted, seed=seed).choices
        if calls := calls_of(choice.message):
            for name, arguments in calls if choice.finish_reason != "length" else calls[:-1]:
                check_call(name, arguments)
        else:
            assert choice.finish_reason == "stop"
            Draft202012Validator(schema).validate(json.loads(choice.message.content))


def test_stop_tokens_that_a_call_is_made_of_are_the_sender_s_fault(client: openai.OpenAI) -> None:
    """All plain text ends the answer, so that no letter of a call may be written."""
    forbidden = {"stop_token_ids": list(range(3, 512))}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, extra_body=forbidden, tool_choice="required")
    assert caught.value.param == "tools" and "stop_token_ids" in str(caught.value)

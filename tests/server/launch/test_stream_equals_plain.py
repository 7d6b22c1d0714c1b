"""Random requests, each asked twice: a stream says to the letter what the whole answer says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from makers.gunicorn_server import Server
from makers.openai_tools import TOOLS, joined, named

NUM_REQUESTS = 40
SCHEMA = TOOLS[0]["function"]["parameters"]
FIELDS: dict[str, list[Any]] = {
    "temperature": [0, 0.5, 2],
    "top_p": [0.3, 0.9],
    "n": [2, 3],
    "stop": [["e"], ["th", "qu", "\n"], ["{", '"u']],
    "presence_penalty": [1.5],
    "logit_bias": [{"100": 5}, {"5": -100, "300": 3}],
    "max_tokens": [0, 1, 7, 40],
    "logprobs": [True],
    "tools": [TOOLS],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    ],
}
EXTRA: dict[str, list[Any]] = {
    "include_stop_str_in_output": [True],
    "min_tokens": [3],
    "ignore_eos": [True],
    "top_k": [1, 5],
    "min_p": [0.1],
    "repetition_penalty": [1.3],
    "stop_token_ids": [[300, 301, 320]],
    "guided_regex": ["[a-z]{3,20}", "(\U0001f642|\u00e9|\u4e16){1,8}"],
    "separate_reasoning": [True, False],
}


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ENGINEHOUSE_DETERMINISTIC", "1")
        running = Server(engine, tmp_path_factory.mktemp("gunicorn") / "log")
    yield running
    assert running.stop() == 0


def some_of(fields: dict[str, list[Any]], choose: random.Random) -> dict[str, Any]:
    return {name: choose.choice(values) for name, values in fields.items() if choose.random() < 0.3}


def refusal(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    return caught.value.body


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    choose = random.Random(0)
    num_answered = 0
    with server.client() as client:
        for seed in range(NUM_REQUESTS):
            message = {
                "role": "user",
                "content": choose.choice(["What is it?", "\U0001f642 \u00e9"]),
            }
            asked = {"model": "tiny-llama", "messages": [message], "max_tokens": 50, "seed": seed}
            asked |= some_of(FIELDS, choose) | {"extra_body": some_of(EXTRA, choose)}
            if "tools" in asked:
                choices = ["auto", "none", "required", named("get_weather")]
                asked["tool_choice"] = choose.choice(choices)
            try:
                plain = client.chat.completions.create(**asked)
            except openai.BadRequestError as error:
                assert refusal(client, {**asked, "stream": True}) == error.body
                continue
            num_answered += 1
            options = {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last = client.chat.completions.create(**asked, **options)
            wanted = [
                (
                    choice.message.content or "",
                    [
                        (c.function.name, c.function.arguments)
                        for c in choice.message.tool_calls or []
                    ],
                    choice.finish_reason,
                    choice.logprobs.content if choice.logprobs else [],
                )
                for choice in plain.choices
            ]
            assert joined(chunks, len(wanted)) == wanted, json.dumps(asked)
            assert last.usage.total_tokens == plain.usage.total_tokens
    assert num_answered > NUM_REQUESTS // 3

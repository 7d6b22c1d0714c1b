"""The scripted engine that clients are tried against: what it says, and what it cannot say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.paths import ROOT

MODEL = "scripted"
WEATHER = "What is the weather in Paris?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    sys.path.insert(0, str(ROOT / "scripts"))
    answers, made = import_module("scripted.answers"), import_module("scripted.engine")
    sys.path.remove(str(ROOT / "scripts"))
    folder: Path = tmp_path_factory.mktemp("scripted")
    made.write_text(folder)
    engine = made.ScriptedEngine(folder, answers.to_clients)
    yield create_app(ServerSettings(folder, "ipc://none", MODEL), engine).test_client()
    engine.close()


def ask(http: FlaskClient, text: str, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return http.post("/v1/chat/completions", json=body)


def test_it_calls_a_tool_where_the_weather_is_asked_for_and_tells_the_result(
    http: FlaskClient,
) -> None:
    assert ask(http, WEATHER).json["choices"][0]["message"]["content"].startswith("The capital")
    message = ask(http, WEATHER, tools=TOOLS).json["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] == "Paris"
    asked = {"role": "user", "content": WEATHER}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "18"}
    answer = ask(http, "", messages=[asked, message, result], tools=TOOLS).json
    assert answer["choices"][0]["message"]["content"] == "It is 18 degrees and clear in Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_it_says_the_first_answer_that_follows_the_grammar(http: FlaskClient) -> None:
    status = {"properties": {"status": {"type": "string"}}, "required": ["status"]}
    for fields, said in (
        ({"guided_choice": ["no", "yes"]}, "yes"),
        ({"guided_regex": r"\d+-\d+-\d+"}, "1889-03-31"),
        ({"guided_json": {"type": "object", **status}}, '{"status": "ok"}'),
    ):
        assert ask(http, "hi", **fields).json["choices"][0]["message"]["content"] == said


def test_an_answer_ends_at_max_tokens(http: FlaskClient) -> None:
    told = ask(http, "hi", max_tokens=2).json
    assert told["usage"]["completion_tokens"] == 2
    assert told["choices"][0]["finish_reason"] == "length"


def test_a_grammar_that_none_of_its_answers_follows_is_an_error(http: FlaskClient) -> None:
    assert ask(http, "hi", guided_choice=["maybe"]).status_code == 500

"""llm-comply's checks of OpenAI's chat servers, and the schema OpenAI publishes, which it brings.

The engine is scripted: what is checked is the server's doing, not whether a model is clever enough
to end, or to call the tool. Everything else is as `llm-comply --format openai-chat` does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from llm_comply.result import TestStatus as Status
from llm_comply.schema import SpecLoader
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import PATHS, data_of
from makers.judges import judged, served, specification
from makers.text_engine import engine_info
from makers.token_outputs import STOP, bytes_ids, scored, tokens

pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver:DeprecationWarning")

MODEL = "tiny-deepseek-r1"  # of models without such a name its check of reasoning asks nothing
TEXT, CALL = "<think>hm</think>Hello!", '{"name": "get_weather", "arguments": {"location": "SF"}}'
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
# What does not pass, and why.
REFUSED = {"chat-image-input": "HTTP 400 (expected [200])"}  # the engine reads text only


@pytest.fixture(scope="module")
def published() -> SpecLoader:
    made = specification("openai_chat")
    chunk = made.get_schema("CreateChatCompletionStreamResponse")
    assert chunk is not None
    # Both are nullable: the loader says so in a type, not in an enum, nor where there is no type.
    reason = chunk["properties"]["choices"]["items"]["properties"]["finish_reason"]
    usage = chunk["properties"]["usage"]
    assert "null" in reason["type"] and "contains a null value" in usage["description"]
    reason["enum"].append(None)
    usage["anyOf"] = [{"$ref": usage.pop("$ref")}, {"type": "null"}]
    return made


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    engine.info = engine_info(max_seq_len=100_000)
    given = dataclasses.replace(settings, model_name=MODEL, reasoning_format="think")
    return create_app(given, engine).test_client()


@pytest.fixture
def url(http: FlaskClient) -> Iterator[str]:
    with served(http) as address:
        yield address


@pytest.mark.parametrize("case", OPENAI_CHAT_TESTS, ids=lambda case: str(case.id))
def test_a_check_passes_or_is_refused_for_a_reason(
    url: str, engine: ScriptedClient, published: SpecLoader, case: Any
) -> None:
    engine.script = tokens(CALL if case.id == "chat-tool-calling" else TEXT, STOP)
    result = judged(url, MODEL, case, published)
    if case.id in REFUSED:
        assert result.status is Status.FAILED and result.errors[0] == REFUSED[case.id]
    else:
        assert (result.status, result.errors) == (Status.PASSED, [])
    assert result.warnings == []


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
PROMPT = {"model": MODEL, "prompt": "hello"}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SCORES = {"logprobs": True, "top_logprobs": 2}
TOLD: list[tuple[str, dict[str, Any], str]] = [
    (PATHS[0], {**CHAT}, "CreateChatCompletionResponse"),
    (PATHS[0], {**CHAT, **SCORES, "n": 2}, "CreateChatCompletionResponse"),
    (PATHS[0], {**CHAT, **SCORES, "tools": TOOLS}, "CreateChatCompletionResponse"),
    (PATHS[0], {**CHAT, "stream": True}, "CreateChatCompletionStreamResponse"),
    (
        PATHS[0],
        {**CHAT, **SCORES, "tools": TOOLS, "n": 2, **STREAM},
        "CreateChatCompletionStreamResponse",
    ),
    ("/v1/completions", {**PROMPT}, "CreateCompletionResponse"),
    ("/v1/completions", {**PROMPT, "logprobs": 2, "n": 2}, "CreateCompletionResponse"),
    (PATHS[0], {**CHAT, "temperature": 3}, "ErrorResponse"),
    (PATHS[0], {**CHAT, "model": "gpt"}, "ErrorResponse"),
]


@pytest.mark.parametrize(("path", "body", "schema"), TOLD, ids=str)
def test_what_is_told_follows_the_schema_that_openai_publishes(
    http: FlaskClient,
    engine: ScriptedClient,
    published: SpecLoader,
    path: str,
    body: dict[str, Any],
    schema: str,
) -> None:
    engine.script = [
        item
        for index, text in enumerate((CALL, TEXT))
        for item in (
            *(scored([i], index=index) for i in bytes_ids(text)),
            scored([], STOP, index),
        )
    ]
    with http.post(path, json=body) as response:
        told = data_of([response.data])[:-1] if body.get("stream") else [response.json]
    for each in told:
        assert published.validate(each, schema) == []


def test_models_follow_the_schema_that_openai_publishes(
    http: FlaskClient, published: SpecLoader
) -> None:
    assert published.validate(http.get("/v1/models").json, "ListModelsResponse") == []
    assert published.validate(http.get(f"/v1/models/{MODEL}").json, "Model") == []
    assert published.validate({"object": "list"}, "ListModelsResponse") != []  # it can fail

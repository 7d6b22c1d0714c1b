"""Each limit of a request: what stands at it is taken, one more is refused, docs/api.md says so."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, NamedTuple

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire import shapes
from enginehouse.server.wire.json_body import MAX_FREE_DEPTH
from makers.api_client import error_of
from makers.paths import ROOT
from makers.text_engine import engine_info
from makers.token_outputs import STOP, bytes_ids, scored

CHAT, TEXT, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/detokenize"
EMBEDDINGS = "/v1/embeddings"
HELLO = {"role": "user", "content": "hello"}
TEMPLATE = "/apply-template"
CONTEXT, MAX_BODY_BYTES = 20_000, 4 << 20


def tool(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}"}}


def call(number: int) -> dict[str, Any]:
    return {"id": f"c{number}", **tool(number)}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def tagged(number: int) -> dict[str, Any]:
    tags = [{"begin": f"<{i}>", "schema": {}, "end": ">"} for i in range(number)]
    return {"type": "structural_tag", "structures": tags, "triggers": ["<"]}


class Limit(NamedTuple):
    """made: the fields of a request with so many. row: how the document's row begins."""

    most: int
    path: str
    param: str
    made: Any
    row: str


LIMITS: dict[str, Limit] = {
    "stop": Limit(shapes.MAX_STOPS, CHAT, "stop", lambda n: {"stop": ["a"] * n}, "`stop`"),
    "a stop's text": Limit(
        shapes.MAX_STOP_CHARS, TEXT, "stop[0]", lambda n: {"stop": "x" * n}, "`stop`"
    ),
    "stop_token_ids": Limit(
        shapes.MAX_STOP_IDS,
        CHAT,
        "stop_token_ids",
        lambda n: {"stop_token_ids": [5] * n},
        "`stop_token_ids`",
    ),
    "logit_bias": Limit(
        shapes.MAX_BIASES,
        CHAT,
        "logit_bias",
        lambda n: {"logit_bias": {str(i): 1 for i in range(n)}},
        "`logit_bias`",
    ),
    "n": Limit(4, CHAT, "n", lambda n: {"n": n}, "`n`"),
    "best_of": Limit(shapes.MAX_BEST_OF, CHAT, "best_of", lambda n: {"best_of": n}, "`n`"),
    "max_tokens": Limit(
        shapes.MAX_TOKENS, CHAT, "max_tokens", lambda n: {"max_tokens": n}, "`max_tokens`"
    ),
    "tokens": Limit(
        shapes.MAX_TOKENS, DETOKENIZE, "tokens", lambda n: {"tokens": [5] * n}, "`max_tokens`"
    ),
    "top_logprobs": Limit(
        shapes.MAX_LOGPROBS,
        CHAT,
        "top_logprobs",
        lambda n: {"logprobs": True, "top_logprobs": n},
        "`top_logprobs`",
    ),
    "prompts": Limit(
        shapes.MAX_PROMPTS, TEXT, "prompt", lambda n: {"prompt": ["a"] * n}, "`prompt`"
    ),
    "inputs": Limit(
        shapes.MAX_INPUTS, EMBEDDINGS, "input", lambda n: {"input": ["a"] * n}, "`input`"
    ),
    "messages": Limit(
        CONTEXT, TEMPLATE, "messages", lambda n: {"messages": [HELLO] * n}, "`messages`"
    ),
    "ids": Limit(CONTEXT - 1, TEXT, "prompt", lambda n: {"prompt": [5] * n}, "`messages`"),
    "tools": Limit(
        shapes.MAX_TOOLS,
        CHAT,
        "tools",
        lambda n: {"tools": [tool(i) for i in range(n)], "tool_choice": "none"},
        "`tools`",
    ),
    "tool_calls": Limit(
        shapes.MAX_CALLS,
        CHAT,
        "messages[1].tool_calls",
        lambda n: {
            "messages": [HELLO, {"role": "assistant", "tool_calls": [call(i) for i in range(n)]}]
        },
        "`tools`",
    ),
    "pattern": Limit(
        shapes.MAX_GRAMMAR_CHARS,
        CHAT,
        "guided_regex",
        lambda n: {"guided_regex": "a" * n},
        "a schema, pattern",
    ),
    "schema": Limit(
        shapes.MAX_GRAMMAR_CHARS,
        CHAT,
        "guided_json",
        lambda n: {"guided_json": {"title": "x" * (n - 12)}},
        "a schema, pattern",
    ),
    "choices": Limit(
        shapes.MAX_CHOICES,
        CHAT,
        "guided_choice",
        lambda n: {"guided_choice": ["a"] * n},
        "`guided_choice`",
    ),
    "structures": Limit(
        shapes.MAX_STRUCTURES,
        CHAT,
        "response_format.structures",
        lambda n: {"response_format": tagged(n)},
        "`structures`",
    ),
    "triggers": Limit(
        shapes.MAX_STRUCTURES,
        CHAT,
        "response_format.triggers",
        lambda n: {"response_format": {**tagged(1), "triggers": ["<"] * n}},
        "`structures`",
    ),
    "metadata": Limit(
        MAX_FREE_DEPTH, CHAT, "metadata", lambda n: {"metadata": deep(n)}, "levels of objects"
    ),
    "schema's depth": Limit(
        MAX_FREE_DEPTH,
        CHAT,
        "response_format.json_schema.schema",
        lambda n: {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"default": deep(n - 1)}},
            }
        },
        "levels of objects",
    ),
}


@pytest.fixture(scope="module")
def http(settings: ServerSettings) -> FlaskClient:
    info = dataclasses.replace(engine_info(CONTEXT), vocab_size=5000)
    engine = ScriptedClient(info, [scored([i]) for i in bytes_ids("a")])
    engine.script += [(index, scored([], STOP)[1]) for index in range(20)]
    larger = dataclasses.replace(settings, max_body_bytes=MAX_BODY_BYTES)
    return create_app(larger, engine).test_client()


@pytest.mark.parametrize("name", LIMITS)
def test_what_stands_at_a_limit_is_taken_and_one_more_is_refused(
    http: FlaskClient, name: str
) -> None:
    limit = LIMITS[name]
    needs = {
        CHAT: {"messages": [HELLO]},
        TEXT: {"prompt": "a"},
    }.get(limit.path, {})
    answers = [
        http.post(limit.path, json={"model": "tiny/chat", **needs, **limit.made(number)})
        for number in (limit.most, limit.most + 1)
    ]
    assert answers[0].status_code == 200, answers[0].json
    assert answers[1].status_code == 400
    error = error_of(answers[1])
    assert error["param"] == limit.param and error["code"], error


@pytest.mark.parametrize("name", LIMITS)
def test_the_document_says_each_limit(name: str) -> None:
    limit = LIMITS[name]
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    text = text.partition("\n## Limits\n")[2].partition("\n## ")[0]
    [row] = [line for line in text.splitlines() if line.startswith(f"| {limit.row}")]
    if limit.most >= CONTEXT - 1 and limit.most <= CONTEXT:
        assert "as the context has tokens" in row
    else:
        assert re.search(rf"\b{limit.most}\b", row), row


def test_a_body_may_have_so_many_bytes_and_no_more(http: FlaskClient) -> None:
    text = json.dumps({"model": "tiny/chat", "messages": [HELLO]})
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
        answer = http.post(CHAT, data=text.ljust(size), content_type="application/json")
        assert answer.status_code == status

"""Tokens that the tokenizer has and the model has not: named in a 400, not the engine's failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from makers.api_client import PATHS, error_of
from makers.token_outputs import PIECES, TOKENIZER

MARK = "<think> é"
MARK_ID = TOKENIZER.token_to_id(MARK)


@pytest.fixture
def smaller(engine: ScriptedClient) -> ScriptedClient:
    """An engine whose model ends where the added token begins."""
    engine.info = replace(engine.info, vocab_size=MARK_ID)
    return engine


CHAT = {"messages": [{"role": "user", "content": f"hello {MARK}"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        *((path, CHAT, "messages") for path in PATHS),
        ("/v1/completions", {"prompt": f"hello {MARK}"}, "prompt"),
        ("/v1/completions", {"prompt": ["hello", MARK]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [5, MARK_ID]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [[5], [6, MARK_ID]]}, "prompt[1][1]"),
    ],
)
def test_such_a_prompt_is_refused_and_the_token_named(
    http: FlaskClient, smaller: ScriptedClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json={"model": "tiny/chat", **body})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    assert error["message"] == (
        f'{param}: found the token "{MARK}" of id {MARK_ID}, which is the tokenizer\'s and not the '
        f"model's, whose vocabulary has {MARK_ID} tokens; leave it out"
    )
    assert not smaller.submitted


def test_a_number_that_is_nobodys_token_is_told_so(
    http: FlaskClient, smaller: ScriptedClient
) -> None:
    response = http.post("/v1/completions", json={"model": "tiny/chat", "prompt": [MARK_ID + 1]})
    assert error_of(response)["message"] == (
        f"prompt[0]: {MARK_ID + 1} is no token id; wanted one below {MARK_ID}"
    )


def test_what_asks_no_model_tells_it_like_any_other(
    http: FlaskClient, smaller: ScriptedClient
) -> None:
    tokens = http.post("/tokenize", json={"prompt": f"hello{MARK}"}).json["tokens"]
    assert tokens[-1] == MARK_ID
    assert http.post("/detokenize", json={"tokens": tokens}).json == {"prompt": f"hello{MARK}"}
    assert MARK in http.post("/apply-template", json=CHAT).json["prompt"]
    beyond = TOKENIZER.get_vocab_size(with_added_tokens=True)
    response = http.post("/detokenize", json={"tokens": [beyond]})
    assert error_of(response)["param"] == "tokens[0]" and not PIECES.name(beyond)

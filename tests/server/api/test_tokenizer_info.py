"""What is told of the tokenizer, as vLLM tells it and lm-evaluation-harness's client reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import make_key
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire import answers
from makers.text_engine import CHATML, write_text_engine

USER = [{"role": "user", "content": "hello"}]
PREFIXES = ("", "/v1", "/v1/openai")
FLAGS = {"lstrip": False, "normalized": False, "special": True}


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient, tmp_path: Path) -> FlaskClient:
    write_text_engine(tmp_path)
    config = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "eos_token": {"content": "<|im_end|>", **FLAGS},
        "pad_token": "<|im_end|>",
        "added_tokens_decoder": {"1": {"content": "<|im_end|>", **FLAGS}},
        "additional_special_tokens": [{"content": "<|im_start|>", **FLAGS}],
        "chat_template": "the file beside it is the one that counts",
        "model_max_length": 10**30,
        "add_bos_token": False,
        "vocab_file": "/somewhere/vocab.json",
        "name_or_path": "/somewhere",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    given = dataclasses.replace(settings, engine_dir=tmp_path)
    return create_app(given, engine).test_client()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_configuration_is_told_with_tokens_as_their_texts(
    http: FlaskClient, prefix: str
) -> None:
    told = http.get(f"{prefix}/tokenizer_info").json
    answers.TokenizerInfo.model_validate(told)
    assert told == {
        "tokenizer_class": "Qwen2TokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": None,
        "added_tokens_decoder": {"1": "<|im_end|>"},
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": CHATML,
        "model_max_length": 256,
        "add_bos_token": False,
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_client_prepares_the_prompt_that_the_server_would(http: FlaskClient, prefix: str) -> None:
    """The requests of lm-evaluation-harness's RemoteTokenizer."""

    def post(path: str, **body: Any) -> Any:
        return http.post(f"{prefix}/{path}", json=body).json

    info = http.get(f"{prefix}/tokenizer_info").json
    template = jinja2.Template(info["chat_template"], trim_blocks=True, lstrip_blocks=True)
    text = template.render(messages=USER, add_generation_prompt=True)
    assert post("apply-template", messages=USER) == {"prompt": text}
    ids = post("tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert ids == post("tokenize", messages=USER)["tokens"]
    assert post("detokenize", tokens=ids) == {"prompt": text}
    eos = post("tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert eos == [1]


def test_it_wants_a_key_and_an_engine_without_a_template_says_so(
    settings: ServerSettings, engine: ScriptedClient, tmp_path: Path
) -> None:
    write_text_engine(tmp_path, None)
    given = dataclasses.replace(settings, engine_dir=tmp_path, api_keys=(make_key("first"),))
    http = create_app(given, engine).test_client()
    assert http.get("/tokenizer_info").status_code == 401
    engine.ready = False
    told = http.get("/tokenizer_info", headers={"X-Api-Key": "first"}).json
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["chat_template"] is None and told["eos_token"] == "<|im_end|>"

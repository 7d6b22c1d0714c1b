"""POST /v1/embeddings: vectors in OpenAI's form, of every form of input, and what is refused."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace
from typing import Any

import gevent
import openai
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from doubles.scripted_client import ScriptedClient, scripted_vector
from enginehouse.runtime.request import FinishReason, Pooling, PoolingKind, TokenOutput
from enginehouse.server.api.embeddings.body import EmbeddingsBody
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire.refused_fields import UNSUPPORTED_IN_EMBEDDINGS
from makers.api_client import error_of
from makers.field_cases import (
    MISSING,
    TYPE,
    VALUE,
    Field,
    flag,
    integer,
    text,
    words,
)
from makers.paths import ROOT
from makers.token_outputs import TOKENIZER

PATH = "/v1/embeddings"
HELLO = {"model": "tiny/chat", "input": "hello"}
DOCUMENT = (ROOT / "docs" / "embeddings.md").read_text(encoding="utf-8")
BAD_INPUTS = [
    (None, "input", MISSING),
    (5, "input", TYPE),
    ({}, "input", TYPE),
    ([], "input", TYPE),
    (["a", 5], "input[1]", TYPE),
    ([[5], []], "input[1]", TYPE),
    ([5, -1], "input[1]", TYPE),
    ([5, 304], "input[1]", VALUE),
    ([[5], [304]], "input[1][0]", VALUE),
    ("", "input", VALUE),
    (["a", ""], "input[1]", VALUE),
    (["a"] * 2049, "input", VALUE),
    ([5] * 256, "input", "context_length_exceeded"),
    ([[5], [6] * 256], "input[1]", "context_length_exceeded"),
]
FIELDS: dict[str, Field] = {
    "model": Field(["tiny/chat", "tiny-engine"], [(5, "model", TYPE), (None, "model", MISSING)]),
    "input": Field(["hello", ["hello", "dog"], [5, 6], [[5], [6, 7]]], BAD_INPUTS),
    "encoding_format": words("encoding_format", ["float", "base64"]),
    "dimensions": integer("dimensions", [1, 4], [0, -1, 5, 65_537]),
    "pooling": words("pooling", ["last", "mean"]),
    "normalize": flag("normalize"),
    "add_special_tokens": flag("add_special_tokens"),
    "priority": integer("priority", [-(2**31), 2**31 - 1], [2**31, -(2**31) - 1]),
    "strict_fields": flag("strict_fields"),
    "user": text("user", ["a", ""]),
    "metadata": Field([{}], [(5, "metadata", TYPE), ("a", "metadata", TYPE)]),
}


def ask(http: FlaskClient, **fields: Any) -> Any:
    return http.post(PATH, json={**HELLO, **fields})


def ids_of(words: str) -> list[int]:
    return list(TOKENIZER.encode(words).ids)


def vectors(response: Any) -> list[Any]:
    assert response.status_code == 200, response.json
    assert response.json["object"] == "list" and response.json["model"] == "tiny/chat"
    data = response.json["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    return [item["embedding"] for item in data]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hello dog", [ids_of("hello dog")]),
        (["hello", "the lazy dog"], [ids_of("hello"), ids_of("the lazy dog")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_each_input_has_its_vector_and_all_are_paid_for(
    http: FlaskClient, given: Any, prompts: list[list[int]]
) -> None:
    response = ask(http, input=given)
    assert vectors(response) == [scripted_vector(ids) for ids in prompts]
    num_tokens = sum(map(len, prompts))
    cost = round(num_tokens * 0.35e-6, 10)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "estimated_cost": cost}
    assert response.json["usage"] == usage


def test_base64_is_of_the_same_numbers(http: FlaskClient) -> None:
    [told] = vectors(ask(http, encoding_format="base64"))
    assert list(struct.unpack("<4f", base64.b64decode(told))) == scripted_vector(ids_of("hello"))


def test_what_is_asked_of_a_vector_reaches_the_engine(
    http: FlaskClient, engine: ScriptedClient, settings: ServerSettings
) -> None:
    asked = [{}, {"pooling": "mean", "dimensions": 2}, {"normalize": False, "priority": 5}]
    told = [vectors(ask(http, **fields))[0] for fields in asked]
    assert [len(vector) for vector in told] == [4, 2, 4]
    found = [(samplings[0].max_tokens, samplings[0].pooling) for _, samplings in engine.submitted]
    mean = PoolingKind.MEAN
    wanted = [Pooling(), Pooling(mean, 2), Pooling(normalize=False)]
    assert found == [(0, pooling) for pooling in wanted] and engine.priorities == [0, 0, 5]
    set_so = create_app(replace(settings, pooling="mean"), engine).test_client()
    ask(set_so)
    ask(set_so, pooling="last")
    kinds = [samplings[0].pooling for _, samplings in engine.submitted[-2:]]
    assert kinds == [Pooling(mean), Pooling()]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_what_is_legal_and_names_what_is_not(
    http: FlaskClient, engine: ScriptedClient, name: str
) -> None:
    for value in FIELDS[name].legal:
        response = ask(http, **{name: value})
        assert response.status_code == 200 and "X-Ignored-Fields" not in response.headers
    engine.submitted.clear()
    for value, param, code in FIELDS[name].refused:
        response = ask(http, **{name: value})
        error = error_of(response)
        found = (response.status_code, error["param"], error["code"])
        assert found == (400, param, code), (value, error)
        assert error["message"].startswith(param)
    assert engine.submitted == []


def test_every_field_has_its_row_here_and_in_the_document() -> None:
    named = {cell.strip(" `") for line in DOCUMENT.splitlines() for cell in line.split("|")[1:2]}
    assert EmbeddingsBody.model_fields.keys() == FIELDS.keys() == named & FIELDS.keys()


@pytest.mark.parametrize("name", UNSUPPORTED_IN_EMBEDDINGS)
def test_what_is_not_done_is_refused_by_name(http: FlaskClient, name: str) -> None:
    error = error_of(ask(http, **{name: {"x": 1}}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    for idle in UNSUPPORTED_IN_EMBEDDINGS[name]:
        assert ask(http, **{name: idle}).status_code == 200


def test_a_field_that_nobody_knows_is_named_or_refused(http: FlaskClient) -> None:
    assert ask(http, colour="red").headers["X-Ignored-Fields"] == "colour"
    assert ask(http, metadata={"a": "b"}).headers["X-Ignored-Fields"] == "metadata"
    error = error_of(ask(http, colour="red", strict_fields=True))
    assert (error["param"], error["code"]) == ("colour", "unknown_parameter")


def test_an_engine_that_tells_no_hidden_states_says_so(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.info = replace(engine.info, embedding_size=0, backend="tensorrt_llm")
    response = ask(http)
    error = error_of(response)
    found = (response.status_code, error["param"], error["code"])
    assert found == (400, "model", "unsupported_parameter")
    assert "--backend cpu or torch" in error["message"] and '"tensorrt_llm"' in error["message"]


def test_a_model_that_is_not_here_is_a_404(http: FlaskClient) -> None:
    response = ask(http, model="text-embedding-3-small")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank/", "/score", "/classify"])
def test_what_is_of_ranking_models_is_refused_by_name(http: FlaskClient, path: str) -> None:
    response = http.post(path, json={"model": "tiny/chat", "query": "a", "documents": ["b"]})
    assert response.status_code == 404
    assert "wanted a model that ranks" in error_of(response)["message"]


def test_a_long_list_is_computed_a_few_at_a_time_and_in_order(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    given = [[1 + i, 2] for i in range(300)]
    assert vectors(ask(http, input=given)) == [scripted_vector(ids) for ids in given]
    assert [ids for ids, _ in engine.submitted] == given
    engine.pools, engine.script = False, []  # what is submitted waits now
    engine.submitted.clear()
    asking = gevent.spawn(ask, http, input=given)
    most = 2 * engine.info.max_batch_size
    with gevent.Timeout(20):
        while len(engine.submitted) < most:
            gevent.sleep(0.02)
    gevent.sleep(0.2)
    assert len(engine.submitted) == most
    asking.kill()
    assert all(generation.finished for generation in engine.generations)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ([(0, TokenOutput(1, [], FinishReason.STOP))], 500),
        ([(0, TokenOutput(1, [], FinishReason.ERROR, error="the model's hidden states"))], 500),
        ([(0, TokenOutput(1, [], FinishReason.CANCELLED))], 503),
        ([RuntimeError("no place")], 500),
    ],
)
def test_one_that_fails_is_the_answer_and_ends_the_others(
    http: FlaskClient, engine: ScriptedClient, script: list[Any], status: int
) -> None:
    engine.pools, engine.script = False, script
    response = ask(http, input=["hello", "dog"])
    assert response.status_code == status and error_of(response)["message"]
    assert all(generation.finished for generation in engine.generations)


def test_they_are_counted_and_logged_like_any_answer(http: FlaskClient) -> None:
    ask(http, input=["hello", "dog"])
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    num_tokens = len(ids_of("hello")) + len(ids_of("dog"))
    assert samples["enginehouse_prompt_tokens_total",] == num_tokens
    assert samples["enginehouse_request_success_total", "stop"] == 2
    assert samples["enginehouse_request_queue_time_seconds_sum",] == 0.25


def test_openais_own_client_reads_them(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    ask_all = client.embeddings.create

    def both() -> list[Any]:
        given = {"model": "tiny/chat", "input": ["hello", "the dog"]}
        return [ask_all(**given), ask_all(**given, encoding_format="float", dimensions=3)]  # type: ignore[arg-type]

    packed, plain = gevent.get_hub().threadpool.apply(both)
    wanted = [scripted_vector(ids_of(words)) for words in ("hello", "the dog")]
    assert [item.embedding for item in packed.data] == wanted
    assert [item.embedding for item in plain.data] == [vector[:3] for vector in wanted]
    assert packed.usage.total_tokens == packed.usage.prompt_tokens > 0

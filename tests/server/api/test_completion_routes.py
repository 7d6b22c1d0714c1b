from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
import openai
import pytest
from flask.testing import FlaskClient
from gevent import socket as gsocket
from prometheus_client.parser import text_string_to_metric_families

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server.app import create_app
from enginehouse.server.http.metric_names import NAMES
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS, ask, data_of, error_of
from makers.token_outputs import STOP, tokens


@pytest.mark.parametrize("path", PATHS)
def test_both_paths_answer_a_chat(http: FlaskClient, path: str) -> None:
    response = ask(http, path)
    assert response.status_code == 200
    assert response.json["choices"][0]["message"]["content"] == "the lazy dog"
    assert response.json["model"] == "tiny/chat"
    assert response.json["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("path", PATHS)
def test_both_paths_stream_the_same_text(http: FlaskClient, path: str) -> None:
    with ask(http, path, stream=True, stream_options={"include_usage": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        *chunks, usage, done = data_of([response.data])
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ("".join(texts), done) == ("the lazy dog", "[DONE]")
    assert usage["usage"]["completion_tokens"] > 0


def test_every_sampling_field_reaches_the_engine(http: FlaskClient, engine: ScriptedClient) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "max_tokens": 5,
        "seed": 11,
    }
    assert ask(http, **fields).status_code == 200
    [(prompt_ids, [sampling])] = engine.submitted
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.stop_token_ids == (0, 1)
    assert len(prompt_ids) > 1


def test_max_tokens_is_bounded_by_the_context(http: FlaskClient, engine: ScriptedClient) -> None:
    for asked in (None, 1_000_000):
        ask(http, max_tokens=asked)
        prompt_ids, [sampling] = engine.submitted[-1]
        assert sampling.max_tokens == engine.info.max_seq_len - len(prompt_ids)


def test_max_tokens_zero_answers_without_the_engine(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    response = ask(http, max_tokens=0, n=2)
    choices = [
        (item["message"]["content"], item["finish_reason"]) for item in response.json["choices"]
    ]
    assert choices == [("", "length")] * 2
    assert engine.submitted == []


def test_n_choices_have_seeds_of_their_own(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [*tokens("a", STOP, 1), *tokens("b", STOP, 0), *tokens("c", STOP, 2)]
    response = ask(http, n=3, seed=5)
    texts = [choice["message"]["content"] for choice in response.json["choices"]]
    assert texts == ["b", "a", "c"]
    assert [sampling.seed for sampling in engine.submitted[0][1]] == [5, 6, 7]
    assert response.json["usage"]["completion_tokens"] == 3


def test_a_prompt_longer_than_the_context_is_refused(http: FlaskClient) -> None:
    words = " ".join(str(number) for number in range(300))
    response = ask(http, messages=[{"role": "user", "content": words}])
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "messages",
        "context_length_exceeded",
    )
    assert "256" in error["message"]


REFUSALS: list[tuple[str, str, dict[str, Any], int, str]] = [  # method, path, request, status, type
    ("GET", "/nowhere", {}, 404, "not_found_error"),
    ("GET", "//v1/models", {}, 404, "not_found_error"),
    ("GET", PATHS[0], {}, 405, "invalid_request_error"),
    ("POST", PATHS[0], {"data": "{}"}, 415, "invalid_request_error"),
    ("POST", PATHS[0], {"data": "{}", "content_type": "text/plain"}, 415, "invalid_request_error"),
    ("POST", PATHS[0], {"json": []}, 400, "invalid_request_error"),
    ("POST", PATHS[0], {"json": {**HELLO, "temperature": 3}}, 400, "invalid_request_error"),
    ("POST", PATHS[0], {"json": {**HELLO, "model": "gpt"}}, 404, "not_found_error"),
    ("POST", PATHS[0], {"json": {**HELLO, "user": "u" * 100_000}}, 413, "invalid_request_error"),
    ("GET", "/v1/models/gpt", {}, 404, "not_found_error"),
]


@pytest.mark.parametrize(("method", "path", "request_", "status", "kind"), REFUSALS)
def test_every_refusal_has_one_shape(
    http: FlaskClient, method: str, path: str, request_: dict[str, Any], status: int, kind: str
) -> None:
    response = http.open(path, method=method, **request_)
    assert response.status_code == status
    assert error_of(response)["type"] == kind


def test_a_refused_method_names_the_right_one_and_a_wrong_model_its_param(
    http: FlaskClient,
) -> None:
    assert "POST" in http.get(PATHS[0]).headers["Allow"]
    error = error_of(ask(http, model="gpt"))
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("name", ["tiny/chat", "tiny-engine", "tiny-int4"])
def test_the_served_model_answers_to_its_names(http: FlaskClient, name: str) -> None:
    assert ask(http, model=name).json["model"] == "tiny/chat"
    assert http.get(f"/v1/models/{name}").json["id"] == "tiny/chat"


def test_a_json_content_type_may_name_a_charset(http: FlaskClient) -> None:
    response = http.post(
        PATHS[0], data=json.dumps(HELLO), content_type="application/json; charset=utf-8"
    )
    assert response.status_code == 200


def test_the_model_list_states_context_and_quantisation(http: FlaskClient) -> None:
    [card] = http.get("/v1/models").json["data"]
    assert card == {
        "id": "tiny/chat",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "enginehouse",
        "root": "tiny/chat",
        "parent": None,
        "permission": [],
        "max_model_len": 256,
        "quantization": "W4A16_AWQ",
    }


def test_request_ids_are_kept_when_sane_and_made_when_not(http: FlaskClient) -> None:
    for path in ("/health/live", "/nowhere"):
        kept = http.get(path, headers={"X-Request-Id": "abc-1.2:3"})
        assert kept.headers["X-Request-Id"] == "abc-1.2:3"
        for bad in ("", "a b", "x" * 129, "é"):
            made = http.get(path, headers={"X-Request-Id": bad})
            assert made.headers["X-Request-Id"] not in ("", bad)


def test_unknown_fields_come_back_in_a_header(http: FlaskClient) -> None:
    response = ask(http, **{"foo": 1, "b\r\nx: y": 2})
    assert response.headers["X-Ignored-Fields"] == "b%0D%0Ax%3A%20y, foo"
    assert "X-Ignored-Fields" not in ask(http).headers


def test_an_engine_that_is_not_ready_is_a_503_with_a_time_to_retry(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    assert http.get("/health/ready").status_code == http.get("/health").status_code == 200
    engine.ready = False
    for response in (http.get("/health/ready"), http.get("/health"), ask(http)):
        assert response.status_code == 503
        assert error_of(response)["type"] == "service_unavailable"
        assert int(response.headers["Retry-After"]) > 0
    assert http.get("/health/live").status_code == 200


def test_an_engine_that_dies_is_a_503_and_one_that_fails_a_500_without_internals(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [*tokens("a"), HostUnavailable("it stopped")]
    assert ask(http).status_code == 503
    failures: list[Any] = [
        (0, TokenOutput(1, [], FinishReason.ERROR, error="secret")),
        ZeroDivisionError("secret"),
    ]
    for failure in failures:
        engine.script = [failure]
        response = ask(http)
        assert response.status_code == 500 and error_of(response)["type"] == "api_error"
        assert "secret" not in error_of(response)["message"]


def test_an_end_that_the_model_has_not_is_not_sent_to_the_engine(
    settings: ServerSettings, engine: ScriptedClient, tmp_path: Path
) -> None:
    """A checkpoint's generation_config.json is kept in the engine as it was."""
    folder = tmp_path / "engine"
    shutil.copytree(settings.engine_dir, folder)
    path = folder / "generation_config.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, "eos_token_id": [2, 304, 99999, -1, "x"]}))
    app = create_app(replace(settings, engine_dir=folder), engine)
    assert ask(app.test_client()).status_code == 200
    [(_, [sampling])] = engine.submitted
    assert 2 in sampling.stop_token_ids
    assert max(sampling.stop_token_ids) < engine.info.vocab_size == 304


def test_a_stream_that_is_never_read_is_cancelled(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens("a")
    ask(http, stream=True).close()
    assert engine.generations[0].finished


def test_metrics_tell_answers_tokens_and_the_engine_s_state(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    ask(http)
    ask(http, temperature=9)
    engine.script.insert(1, None)
    ask(http, stream=True).close()
    text = http.get("/metrics").text
    for line in (
        'enginehouse_requests_total{status="200"} 2.0',
        'enginehouse_requests_total{status="400"} 1.0',
        'enginehouse_request_success_total{finish_reason="stop"} 1.0',
        'enginehouse_request_success_total{finish_reason="cancelled"} 1.0',
        "enginehouse_time_to_first_token_seconds_count 2.0",
        "enginehouse_e2e_request_latency_seconds_count 1.0",
        "enginehouse_time_per_output_token_seconds_count 1.0",
        'enginehouse_request_errors_total{code="invalid_value",status="400"} 1.0',
        "enginehouse_num_requests_running 3.0",
        "enginehouse_kv_cache_usage_ratio 0.6",
        "enginehouse_kv_cache_limit_bytes 10000.0",
        "enginehouse_kv_cache_sequence_bytes 6000.0",
        "enginehouse_kv_cache_prefix_bytes 3000.0",
        "enginehouse_preemptions_total 0.0",
        "enginehouse_spec_decode_num_draft_tokens_total 7.0",
        "enginehouse_spec_decode_num_accepted_tokens_total 5.0",
    ):
        assert line in text.splitlines()


def test_times_and_costs_are_those_of_the_answers(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [
        (0, TokenOutput(1, [5], queued_s=0.2)),
        (0, TokenOutput(1, [6])),
        (0, TokenOutput(1, [7], FinishReason.LENGTH)),
    ]
    usage = ask(http).get_json()["usage"]
    lines = http.get("/metrics").text.splitlines()
    assert "enginehouse_inter_token_latency_seconds_count 2.0" in lines
    assert 'enginehouse_request_queue_time_seconds_bucket{le="0.1"} 0.0' in lines
    assert 'enginehouse_request_queue_time_seconds_bucket{le="0.25"} 1.0' in lines
    (cost,) = (
        line for line in lines if line.startswith("enginehouse_estimated_cost_dollars_total")
    )
    assert float(cost.split()[1]) == usage["estimated_cost"] > 0
    (build,) = (line for line in lines if line.startswith("enginehouse_build_info{"))
    assert build.endswith(" 1.0") and 'quantization="' in build


@pytest.mark.parametrize("whose", ["vllm", "trtllm"])
def test_other_servers_names_have_our_values(
    settings: ServerSettings, engine: ScriptedClient, whose: str
) -> None:
    engine.script = [(0, TokenOutput(1, [5], FinishReason.LENGTH, queued_s=0.1))]
    named = replace(settings, metric_names=(whose,))
    http = create_app(named, engine).test_client()
    ask(http)
    families = {
        each.name: each for each in text_string_to_metric_families(http.get("/metrics").text)
    }
    for ours, theirs in NAMES[whose].items():
        found, wanted = families[theirs].samples, families[f"enginehouse_{ours}"].samples
        assert [each.value for each in found] == [each.value for each in wanted], theirs
        assert all(each.labels["model_name"] == "tiny/chat" for each in found)
    (ended,) = (
        each
        for each in families[NAMES[whose]["request_success"]].samples
        if each.labels.get("finished_reason") == "length" and each.name.endswith("_total")
    )
    assert ended.value == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_generation(
    address: tuple[str, int], engine: ScriptedClient, stream: bool
) -> None:
    engine.script = tokens("a")
    body = json.dumps({**HELLO, "stream": stream}).encode()
    head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with gsocket.create_connection(address) as client:
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with gevent.Timeout(5):
            while not engine.generations:
                gevent.idle()
        assert not engine.generations[0].finished
    assert engine.generations[0].ended.wait(5)


def test_the_official_client_reads_answers_streams_and_errors(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}/v1"

    def converse() -> tuple[str | None, str, str | None]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            chat = client.chat.completions
            messages: Any = HELLO["messages"]
            plain = chat.create(model="tiny/chat", messages=messages)
            with chat.create(model="tiny/chat", messages=messages, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            with pytest.raises(openai.BadRequestError) as caught:
                chat.create(model="tiny/chat", messages=messages, temperature=2.5)
            return plain.choices[0].message.content, text, caught.value.param

    answers = gevent.get_hub().threadpool.spawn(converse).get(timeout=30)
    assert answers == ("the lazy dog", "the lazy dog", "temperature")

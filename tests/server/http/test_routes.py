"""What stands around completions: tokens, templates, methods, documents."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import gevent
import pytest
from flask.testing import FlaskClient
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import Refusal
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import PATHS, ask, error_of
from makers.api_fixtures import SocketHandler
from makers.text_engine import CHATML, byte_level_tokenizer, engine_info, write_text_engine

TOKENIZER = byte_level_tokenizer()
USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "Sure: "}
OPENING = "<|im_start|>assistant\n"
ASKED = "<|im_start|>user\nhello<|im_end|>\n"


@pytest.fixture
def thinking(tmp_path: Path, engine: ScriptedClient) -> FlaskClient:
    """A template that reads a variable and trims what it is given."""
    source = CHATML.replace("['content'] }}", "['content'] | trim }}")
    source += "{% if enable_thinking %}<think>{% endif %}"
    write_text_engine(tmp_path / "engine", source)
    settings = ServerSettings(tmp_path / "engine", "ipc://unused", "tiny/chat")
    return create_app(settings, engine).test_client()


@pytest.mark.parametrize("special", [True, False])
def test_tokenize_and_detokenize_are_each_other_s_inverse(http: FlaskClient, special: bool) -> None:
    text = "hello 🙂 <|im_end|> dog"
    asked = {"prompt": text, "return_token_strs": True, "add_special_tokens": special}
    made = http.post("/tokenize", json=asked).json
    ids = TOKENIZER.encode(text).ids
    assert (made["tokens"], made["count"], made["max_model_len"]) == (ids, len(ids), 256)
    assert made["token_strs"] == [TOKENIZER.id_to_token(i) for i in ids]
    assert http.post("/detokenize", json={"tokens": ids}).json == {"prompt": text}


def test_a_conversation_is_tokenized_and_rendered_as_a_completion_would(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    ask(http)
    [(prompt_ids, _)] = engine.submitted
    made = http.post("/tokenize", json={"messages": [USER], "model": "tiny/chat"}).json
    assert (made["tokens"], made["token_strs"]) == (prompt_ids, None)
    text = http.post("/apply-template", json={"messages": [USER]}).json["prompt"]
    assert text == ASKED + OPENING
    assert TOKENIZER.encode(text).ids == prompt_ids


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"messages": [USER], "add_generation_prompt": False}, ASKED),
        (
            {"messages": [USER, ASSISTANT], "continue_final_message": True},
            ASKED + OPENING + "Sure: ",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "content": ""}], "continue_final_message": True},
            ASKED + OPENING,
        ),
    ],
)
def test_a_final_message_is_continued_where_it_ends(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], wanted: str
) -> None:
    assert http.post("/apply-template", json=fields).json == {"prompt": wanted}
    assert ask(http, **fields).status_code == 200
    [(prompt_ids, _)] = engine.submitted
    assert prompt_ids == TOKENIZER.encode(wanted).ids


def test_template_variables_are_read_or_named(thinking: FlaskClient) -> None:
    def render(**kwargs: Any) -> Any:
        asked = {"messages": [USER], "chat_template_kwargs": kwargs}
        return thinking.post("/apply-template", json=asked)

    assert render(enable_thinking=True).json["prompt"] == ASKED + OPENING + "<think>"
    assert render(enable_thinking=False).json["prompt"] == ASKED + OPENING
    for name in ("colour", "messages", "add_generation_prompt"):
        response = render(**{name: 1})
        assert response.json["prompt"] == ASKED + OPENING
        assert response.headers["X-Ignored-Fields"] == f"chat_template_kwargs.{name}"


def test_a_template_that_trims_is_continued_without_the_white_space(thinking: FlaskClient) -> None:
    asked = {"messages": [USER, ASSISTANT], "continue_final_message": True}
    made = thinking.post("/apply-template", json=asked).json["prompt"]
    assert made == ASKED + OPENING + "Sure:"


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, "prompt"),
    ("/tokenize", {"prompt": 5}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
    ("/tokenize", {"prompt": "a", "foo": 1, "strict_fields": True}, 400, "foo"),
    ("/tokenize", {"messages": [USER, {"role": "user"}]}, 400, "messages[1].content"),
    ("/tokenize", {"messages": [USER] * 257}, 400, "messages"),
    ("/detokenize", {"tokens": [5, 100_000]}, 400, "tokens[1]"),
    ("/detokenize", {"tokens": [5, True]}, 400, "tokens[1]"),
    ("/detokenize", {"tokens": "5"}, 400, "tokens"),
    ("/detokenize", {}, 400, "tokens"),
    ("/apply-template", {"messages": []}, 400, "messages"),
    ("/apply-template", {"messages": [USER], "tools": [1]}, 400, "tools[0]"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_a_refusal_names_the_field(
    http: FlaskClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = http.post(path, json=body)
    assert (response.status_code, error_of(response)["param"]) == (status, param)


def test_fields_nobody_knows_are_told_here_too(http: FlaskClient) -> None:
    response = http.post("/detokenize", json={"tokens": [5], "foo": 1})
    assert response.headers["X-Ignored-Fields"] == "foo"


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/tiny/chat", "/version", "/health", "/docs", "/openapi.json"],
)
def test_get_paths_take_a_slash_at_the_end_head_and_options(http: FlaskClient, path: str) -> None:
    plain, slash, head = http.get(path), http.get(path + "/"), http.head(path)
    assert plain.status_code == slash.status_code == head.status_code == 200
    assert (plain.data, head.data) == (slash.data, b"")
    assert head.headers["Content-Length"] == str(len(plain.data))
    options = http.options(path)
    allowed = sorted(options.headers["Allow"].split(", "))
    assert (options.status_code, options.json) == (200, {"allow": allowed})
    assert {"GET", "HEAD", "OPTIONS"} <= set(allowed)
    refused = http.post(path, json={})
    assert refused.status_code == 405 and "GET" in refused.headers["Allow"]
    assert error_of(refused)["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", [*PATHS, "/v1/completions", "/tokenize", "/detokenize"])
def test_post_paths_take_a_slash_at_the_end_and_options(http: FlaskClient, path: str) -> None:
    assert http.post(path + "/", json={}).status_code == 400
    assert "POST" in http.options(path).headers["Allow"]
    for response in (http.get(path), http.put(path, json={}), http.delete(path)):
        assert response.status_code == 405
        assert error_of(response)["type"] == "invalid_request_error"
    assert http.head(path).status_code == 405


def test_the_fingerprint_is_the_engine_s_digest(engine: ScriptedClient, http: FlaskClient) -> None:
    assert ask(http).json["system_fingerprint"] == "fp_000000000000"
    engine.info = dataclasses.replace(engine_info(), digest="sha256:" + "ab" * 32)
    assert ask(http).json["system_fingerprint"] == "fp_abababababab"


def test_a_body_that_does_not_arrive_is_a_408_and_ends_the_connection(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    hasty = dataclasses.replace(settings, body_timeout_s=0.2)
    app = create_app(hasty, engine)
    server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
    server.start()
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with gevent.Timeout(10), gsocket.create_connection(server.address) as client:
        client.sendall(head + b'Content-Length: 99\r\n\r\n{"prompt": ')
        answer = b""
        while part := client.recv(65536):
            answer += part
    server.stop(timeout=1)
    header, _, body = answer.partition(b"\r\n\r\n")
    assert int(header.split()[1]) == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_too_many_requests_would_be_told_when_to_come_again(http: FlaskClient) -> None:
    @http.application.get("/busy")
    def busy() -> None:
        raise RequestError("busy", code="rate_limit_exceeded", status=429)

    response = http.get("/busy")
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert int(response.headers["Retry-After"]) > 0


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny/chat"])
def test_the_page_s_base_url_and_doubled_slashes_lead_to_the_same(
    http: FlaskClient, path: str
) -> None:
    answer = http.get(path).json
    names = [path.replace("/v1", other) for other in ("/v1/openai", "/v1/", "/v1//openai//")]
    assert [http.get(name).json for name in names] == [answer] * 3


def test_completions_answer_under_the_page_s_base_url(http: FlaskClient) -> None:
    asked = {"model": "tiny/chat", "prompt": "hello", "temperature": 0}
    answers = [http.post(f"{base}/completions", json=asked) for base in ("/v1", "/v1/openai")]
    first, second = (answer.json["choices"] for answer in answers)
    assert first == second


def test_a_path_that_is_not_served_is_told_what_is(http: FlaskClient) -> None:
    response = http.post("/v1/openai/moderations", json={})
    message = error_of(response)["message"]
    assert response.status_code == 404
    assert message.startswith("POST /v1/openai/moderations is not served; this server answers: ")
    assert all(path in message for path in ("/v1/chat/completions", "/v1/models/{id}", "/tokenize"))


def test_the_address_in_the_banner_says_where_everything_is(http: FlaskClient) -> None:
    told = http.get("/").json
    assert told.pop("server") == "enginehouse" and told.pop("api") == "/v1"
    assert {http.get(path).status_code for path in told.values()} == {200}


def test_a_host_that_stands_still_is_not_ready(http: FlaskClient, engine: ScriptedClient) -> None:
    assert http.get("/health/ready").status_code == 200
    engine.stands_still = True
    response = http.get("/health/ready")
    assert response.status_code == 503 and "nothing for 20 s" in error_of(response)["message"]
    assert http.get("/health/live").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_full_queue_is_429_before_the_prompt_is_read(
    http: FlaskClient, engine: ScriptedClient, path: str
) -> None:
    engine.no_room = Refusal("the queue is full", code="queue_full", status=429, retry_after_s=17)
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": "x" * 4000}
    response = http.post(path, json={"model": "tiny/chat", **prompt})
    assert response.status_code == 429 and response.headers["Retry-After"] == "17"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert not engine.submitted


def test_a_compressed_body_is_refused_by_its_name(http: FlaskClient) -> None:
    packed = gzip.compress(json.dumps({"model": "tiny/chat", "messages": [USER]}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = http.post("/v1/chat/completions", data=packed, headers=headers)
    assert response.status_code == 415
    assert error_of(response)["message"].startswith('Content-Encoding: found "gzip"')

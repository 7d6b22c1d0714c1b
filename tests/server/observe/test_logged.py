"""What lines about a request have beside their words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import make_key
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS, ask
from makers.token_outputs import tokens


def fields(caplog: pytest.LogCaptureFixture, *names: str) -> list[dict[str, Any]]:
    return [{n: getattr(r, n) for n in names if hasattr(r, n)} for r in caplog.records]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_found_by_the_request_s_id(
    http: FlaskClient, engine: ScriptedClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine.script = [*tokens("a"), ZeroDivisionError("a bug")]
    answer = http.post(
        PATHS[0], json={**HELLO, "stream": stream}, headers={"X-Request-Id": "client-7"}
    )
    assert "client-7" in answer.text
    assert fields(caplog, "request_id") == [{"request_id": "client-7"}]
    assert engine.labels == ["client-7"], "the engine's host names it alike"


def test_a_stream_that_is_left_is_told_with_key_and_model(
    settings: ServerSettings, engine: ScriptedClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    http = create_app(replace(settings, api_keys=(make_key("sk-1"),)), engine).test_client()
    engine.script = tokens("a")
    headers = {"X-Request-Id": "client-7", "Authorization": "Bearer sk-1"}
    http.post(PATHS[0], json={**HELLO, "stream": True}, headers=headers).close()
    key = make_key("sk-1").name
    wanted = {"request_id": "client-7", "key": key, "model": "tiny/chat"}
    assert fields(caplog, "request_id", "key", "model") == [wanted]


@pytest.mark.parametrize("path", [PATHS[0], "/v1/completions"])
def test_prompts_are_logged_only_where_that_is_asked_for(
    settings: ServerSettings, engine: ScriptedClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level("DEBUG")
    asked = {"messages": HELLO["messages"]} if path == PATHS[0] else {"prompt": "hello"}
    for log_prompts in (False, True):
        caplog.clear()
        app = create_app(replace(settings, log_prompts=log_prompts), engine)
        body = {"model": "tiny/chat", **asked}
        assert app.test_client().post(path, json=body).status_code == 200
        told = fields(caplog, "event", "prompt")
        assert [line["event"] for line in told] == ["prompt"] * log_prompts
        assert all("hello" in line["prompt"] for line in told)
        assert ("hello" in caplog.text) == log_prompts


def test_refusals_and_failures_never_show_the_text_of_a_prompt(
    http: FlaskClient, engine: ScriptedClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    messages = [{"role": "user", "content": "a word nobody may read"}]
    ask(http, messages=messages, temperature=9)
    ask(http, messages=[*messages, {"role": "x", "content": "nobody"}])
    engine.script = [ZeroDivisionError("a bug")]
    ask(http, messages=messages)
    assert caplog.records and "nobody" not in caplog.text

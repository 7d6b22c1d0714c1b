"""What an answer took, in its headers."""

from __future__ import annotations

import re

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server.observe.timing import server_timing
from makers.api_client import HELLO, PATHS, ask
from makers.completions import completion


def entries(value: str) -> dict[str, float]:
    """A Server-Timing header's names and durations."""
    parts = [re.fullmatch(r"(\w+);dur=([0-9]+\.[0-9])", part) for part in value.split(", ")]
    assert all(parts), value
    return {part[1]: float(part[2]) for part in parts if part}


def test_each_part_is_the_time_between_its_moments() -> None:
    answer = completion()
    answer.started_s, answer.submitted_s, answer.queued_s = 10.0, 10.25, 1.0
    assert entries(server_timing(answer)) == {"prepare": 250}
    answer.first_token_s = 12.0
    begun = {"prepare": 250, "queue": 1000, "prefill": 750, "ttft": 2000}
    assert entries(server_timing(answer)) == begun
    answer.finished_s = 15.0
    assert entries(server_timing(answer)) == {**begun, "decode": 3000, "total": 5000}
    answer.queued_s = None
    del begun["queue"], begun["prefill"]
    assert entries(server_timing(answer)) == {**begun, "decode": 3000, "total": 5000}


@pytest.mark.parametrize("path", [PATHS[0], "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_both_headers(
    http: FlaskClient, engine: ScriptedClient, path: str, stream: bool
) -> None:
    engine.script = [
        (0, TokenOutput(1, [5], queued_s=0.0)),
        (0, TokenOutput(1, [6], FinishReason.LENGTH)),
    ]
    asked = HELLO if path == PATHS[0] else {"model": "tiny/chat", "prompt": "hello"}
    with http.post(path, json={**asked, "stream": stream}) as answer:
        told = entries(answer.headers["Server-Timing"])
    first = ["prepare", "queue", "prefill", "ttft"]
    assert list(told) == first + ([] if stream else ["decode", "total"])
    assert int(answer.headers["openai-processing-ms"]) >= int(told["ttft"])


def test_a_stream_that_is_silent_yet_tells_what_it_can(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [None, *engine.script]
    with ask(http, stream=True) as answer:
        assert list(entries(answer.headers["Server-Timing"])) == ["prepare"]


def test_a_refusal_has_the_time_it_took_and_a_probe_none(http: FlaskClient) -> None:
    assert int(ask(http, temperature=9).headers["openai-processing-ms"]) >= 0
    assert "openai-processing-ms" not in http.get("/health").headers
    answer = ask(http, max_tokens=0)
    assert list(entries(answer.headers["Server-Timing"])) == ["total"], "the engine was not asked"

"""What a key may ask: by one worker and by two that share a file, in the form of OpenAI's API."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server.api_keys import KeyLimits, make_key
from enginehouse.server.app import create_app
from enginehouse.server.http.rate_limits import RateLimits
from enginehouse.server.http.shared_counts import SharedCounts
from enginehouse.server.settings import ServerSettings
from makers.api_client import error_of

KEYS = (
    make_key("slow", KeyLimits(rpm=2)),
    make_key("short", KeyLimits(tpm=100)),
    make_key("lone", KeyLimits(concurrent=1)),
    make_key("free"),
)
ASKED = {"model": "tiny/chat", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def limited(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    engine.script = [(0, TokenOutput(1, [5], FinishReason.LENGTH))]
    return create_app(dataclasses.replace(settings, api_keys=KEYS), engine).test_client()


def ask(http: FlaskClient, key: str, path: str = "/v1/chat/completions") -> TestResponse:
    headers = {"Authorization": f"Bearer {key}"}
    return http.post(path, json=ASKED, headers=headers, buffered=True)


def test_requests_of_a_minute_are_counted_and_told(limited: FlaskClient) -> None:
    first, second, third = (ask(limited, "slow") for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    told = first.headers
    assert told["x-ratelimit-limit-requests"] == "2"
    assert told["x-ratelimit-remaining-requests"] == "1"
    assert 1 <= int(told["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-tokens" not in told
    error = error_of(third)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(third.headers["Retry-After"]) <= 60
    assert ask(limited, "free").status_code == 200, "another key's minute is its own"
    assert not any(name.startswith("x-ratelimit") for name in ask(limited, "free").headers.keys())


def test_a_clock_that_is_set_begins_no_new_minute(
    limited: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    day_s, now_s = 86_400, time.time()
    for _ in range(2):
        assert ask(limited, "slow").status_code == 200
    for seconds in (day_s, -day_s):
        monkeypatch.setattr(time, "time", lambda: now_s + seconds)  # noqa: B023
        assert ask(limited, "slow").status_code == 429


def test_a_slash_at_the_end_is_the_same_path(limited: FlaskClient) -> None:
    statuses = [ask(limited, "slow", "/v1/chat/completions/").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_tokens_of_a_minute_are_those_of_prompts_and_answers(limited: FlaskClient) -> None:
    answer = ask(limited, "short")
    used = answer.get_json()["usage"]["total_tokens"]
    assert 1 < used < 50
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 100 - used
    statuses = [ask(limited, "short").status_code for _ in range(10)]
    assert statuses[-1] == 429 and statuses.count(200) == -(-100 // used) - 1


def test_other_paths_count_nothing(limited: FlaskClient) -> None:
    for _ in range(5):
        assert ask(limited, "slow", "/tokenize").status_code != 429
    assert ask(limited, "slow").headers["x-ratelimit-remaining-requests"] == "1"


def test_a_stream_is_open_until_it_is_closed(limited: FlaskClient) -> None:
    headers = {"Authorization": "Bearer lone"}
    stream = limited.post("/v1/chat/completions", json={**ASKED, "stream": True}, headers=headers)
    refused = ask(limited, "lone")
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert "1 requests of this key run already" in error_of(refused)["message"]
    stream.get_data()
    stream.close()
    assert ask(limited, "lone").status_code == 200
    assert ask(limited, "lone").status_code == 200, "a refused or ended request is not open"


def test_a_file_that_is_taken_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "counts.sqlite"
    counts = SharedCounts(path, os.getpid())
    ticket = RateLimits(counts).ticket(KEYS[2])
    ticket.begin()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin immediate")
        ticket.end(5)  # is counted later
        RateLimits(counts).ticket(KEYS[2]).begin()  # is let through
        other.execute("commit")
    again = RateLimits(counts).ticket(KEYS[2])
    again.begin()
    with pytest.raises(RequestError):
        RateLimits(counts).ticket(KEYS[2]).begin()


def test_workers_count_together_and_what_a_dead_one_had_open_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "counts.sqlite"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        pass
    lone, slow = KEYS[2], KEYS[0]
    other, dead = SharedCounts(path, os.getppid()), SharedCounts(path, gone.pid)
    mine = RateLimits(SharedCounts(path, os.getpid()))
    assert dead.open(lone.digest.hex(), 1)
    mine.ticket(lone).begin()
    assert not other.open(lone.digest.hex(), 1), "this process lives, and its request is open"
    theirs = RateLimits(other)
    theirs.ticket(slow).begin()
    mine.ticket(slow).begin()
    for limits in (mine, theirs):
        with pytest.raises(RequestError, match="may ask 2 requests a minute"):
            limits.ticket(slow).begin()

"""A request's line: what it holds, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.server.launch.access_log import access_fields, access_line
from enginehouse.server.wire.responses import KEY_NAME, MODEL, REQUEST_ID, TOKENS


def fields(path: str, status: str = "200 OK", **environ: Any) -> dict[str, Any] | None:
    asked = {"REQUEST_METHOD": "GET", "RAW_URI": path, **environ}
    return access_fields(asked, status, {"X-Request-Id": "abc"}, 1.2345)


def line(path: str, status: str = "200 OK", **environ: Any) -> str | None:
    found = fields(path, status, **environ)
    return None if found is None else access_line(found)


def test_a_completion_is_told_with_its_tokens() -> None:
    tokens = {TOKENS: (33, 100), "REQUEST_METHOD": "POST"}
    assert line("/v1/chat/completions", **tokens) == (
        "POST /v1/chat/completions 200 1234 ms, 33 + 100 tokens, id abc"
    )
    assert line("/v1/models", "404 NOT FOUND") == "GET /v1/models 404 1234 ms, id abc"


def test_the_fields_of_a_line_are_what_a_request_is_found_by() -> None:
    known = {KEY_NAME: "front", MODEL: "tiny/chat", REQUEST_ID: "abc", TOKENS: (33, 100)}
    assert fields("/v1/completions?x=1", **known, REQUEST_METHOD="POST") == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "seconds": 1.2345,
        "request_id": "abc",
        "key": "front",
        "model": "tiny/chat",
        "prompt_tokens": 33,
        "completion_tokens": 100,
    }


def test_a_query_is_not_told_and_no_terminal_obeys_a_path() -> None:
    told = line("/v1/\x1b[2J\nPOST \xe9" + "x" * 500 + "?key=secret")
    assert told is not None and told.isprintable() and len(told) < 260
    assert told.startswith(r"GET /v1/\x1b[2J\nPOST \xe9xxx") and "secret" not in told


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_a_monitor_is_told_of_only_when_something_is_wrong(path: str) -> None:
    assert line(path) is None
    assert line(path, "503 SERVICE UNAVAILABLE") == f"GET {path} 503 1234 ms, id abc"

"""A request's line: what it holds, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.server.launch.access_log import access_line
from enginehouse.server.wire.responses import TOKENS


def line(path: str, status: str = "200 OK", **environ: Any) -> str | None:
    asked = {"REQUEST_METHOD": "GET", "RAW_URI": path, **environ}
    return access_line(asked, status, {"X-Request-Id": "abc"}, 1.2345)


def test_a_completion_is_told_with_its_tokens() -> None:
    tokens = {TOKENS: (33, 100), "REQUEST_METHOD": "POST"}
    assert line("/v1/chat/completions", **tokens) == (
        "POST /v1/chat/completions 200 1234 ms, 33 + 100 tokens, id abc"
    )
    assert line("/v1/models", "404 NOT FOUND") == "GET /v1/models 404 1234 ms, id abc"


def test_a_query_is_not_told_and_no_terminal_obeys_a_path() -> None:
    told = line("/v1/\x1b[2J\nPOST \xe9" + "x" * 500 + "?key=secret")
    assert told is not None and told.isprintable() and len(told) < 260
    assert told.startswith(r"GET /v1/\x1b[2J\nPOST \xe9xxx") and "secret" not in told


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_a_monitor_is_told_of_only_when_something_is_wrong(path: str) -> None:
    assert line(path) is None
    assert line(path, "503 SERVICE UNAVAILABLE") == f"GET {path} 503 1234 ms, id abc"

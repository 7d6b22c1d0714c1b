"""What a client of the API sends, and what it reads of an answer, a stream and a refusal."""

from __future__ import annotations

import json
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

PATHS = ["/v1/chat/completions", "/v1/openai/chat/completions"]
HELLO = {"model": "tiny/chat", "messages": [{"role": "user", "content": "hello"}]}


def ask(http: FlaskClient, path: str = PATHS[0], **fields: Any) -> TestResponse:
    return http.post(path, json={**HELLO, **fields})


def error_of(response: TestResponse) -> dict[str, Any]:
    """Every refusal has one shape and a request id."""
    assert response.mimetype == "application/json"
    assert response.headers["X-Request-Id"]
    assert set(response.json) == {"error"}
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    return dict(error)


def data_of(frames: list[bytes]) -> list[Any]:
    """What a client reads: every event is one `data:` line and an empty line."""
    events = b"".join(frames).decode().split("\n\n")
    assert events.pop() == ""
    lines = [line.removeprefix("data: ") for line in events if not line.startswith(":")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]

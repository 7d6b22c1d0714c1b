"""Flask responses of JSON: an answer, or an error in its one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from flask import Response

from enginehouse.server.wire.error_body import ErrorAnswer

# In WSGI's environ, for who logs: tokens of the prompt and of the answer; the name of an API key;
# the request's id, and its trace's; the model, once it is known that it is served.
TOKENS, KEY_NAME = "enginehouse.tokens", "enginehouse.key"
OF_BATCH = "enginehouse.batch"  # a line of a batch, whose key was asked for when that was made
REQUEST_ID, MODEL = "enginehouse.request_id", "enginehouse.model"
TRACE_ID = "enginehouse.trace_id"


def log_fields(environ: Mapping[str, Any]) -> dict[str, str]:
    """What every line about a request has beside its message, as far as it is known."""
    named = {"request_id": REQUEST_ID, "trace_id": TRACE_ID, "key": KEY_NAME, "model": MODEL}
    return {field: environ[name] for field, name in named.items() if name in environ}


def json_response(data: Mapping[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status=status, content_type="application/json")


def error_response(answer: ErrorAnswer) -> Response:
    response = json_response(answer.body, answer.status)
    if answer.status in (429, 503):
        response.headers["Retry-After"] = str(answer.retry_after_s)
    if answer.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="enginehouse"'
    return response

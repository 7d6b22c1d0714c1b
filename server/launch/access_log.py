"""An answered request -> its line of the access log: method, path, status, time, tokens, key, id.

Knows gunicorn's request and response and WSGI's environ; what writes the line is the log's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.host.log_lines import TRAFFIC
from enginehouse.server.wire.responses import TOKENS, log_fields

_LOG = logging.getLogger(TRAFFIC)
_MOST_PATH = 200
_MONITORS = ("/health", "/health/live", "/health/ready", "/metrics")


def begin(request: Any) -> None:
    """gunicorn's pre_request: its time counts from here."""
    request.begun_s = time.monotonic()


def end(request: Any, environ: Mapping[str, Any], response: Any) -> None:
    """gunicorn's post_request: all of the answer is sent, or its client has gone."""
    if response is None or not _LOG.isEnabledFor(logging.INFO):  # None: it was no HTTP
        return
    seconds = time.monotonic() - request.begun_s
    fields = access_fields(environ, str(response.status), dict(response.headers), seconds)
    if fields is not None:
        _LOG.info(access_line(fields), extra={"event": "request", **fields})


def access_fields(
    environ: Mapping[str, Any], status: str, headers: Mapping[str, str], seconds: float
) -> dict[str, Any] | None:
    """None for what a monitor asks all day and is told that all is well. No text of a request is in
    them, no query, and nothing that a terminal would obey.
    """
    path = str(environ["RAW_URI"]).partition("?")[0]
    code = int(status.partition(" ")[0])
    if path in _MONITORS and code == 200:
        return None
    fields = {
        "method": environ["REQUEST_METHOD"],
        "path": ascii(path[:_MOST_PATH])[1:-1],
        "status": code,
        "seconds": round(seconds, 6),
        **log_fields(environ),
    }
    if TOKENS in environ:
        fields["prompt_tokens"], fields["completion_tokens"] = environ[TOKENS]
    if "X-Request-Id" in headers:
        fields["request_id"] = headers["X-Request-Id"]
    return fields


def access_line(fields: Mapping[str, Any]) -> str:
    """The same to be read."""
    line = "{method} {path} {status} {ms:.0f} ms".format(ms=fields["seconds"] * 1000, **fields)
    if "prompt_tokens" in fields:
        line += ", {prompt_tokens} + {completion_tokens} tokens".format(**fields)
    for field, name in (("key", "key"), ("request_id", "id")):
        if field in fields:
            line += f", {name} {fields[field]}"
    return line

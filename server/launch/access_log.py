"""An answered request -> its line of the access log: method, path, status, time, tokens, key, id.

Knows gunicorn's request and response and WSGI's environ; what writes the line is the log's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.host.log_lines import TRAFFIC
from enginehouse.server.wire.responses import KEY_NAME, TOKENS

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
    line = access_line(environ, str(response.status), dict(response.headers), seconds)
    if line is not None:
        _LOG.info(line)


def access_line(
    environ: Mapping[str, Any], status: str, headers: Mapping[str, str], seconds: float
) -> str | None:
    """None for what a monitor asks all day and is told that all is well. No text of a request is in
    it, no query, and nothing that a terminal would obey.
    """
    path = str(environ["RAW_URI"]).partition("?")[0]
    code = status.partition(" ")[0]
    if path in _MONITORS and code == "200":
        return None
    parts = [f"{environ['REQUEST_METHOD']} {ascii(path[:_MOST_PATH])[1:-1]} {code}"]
    parts[0] += f" {seconds * 1000:.0f} ms"
    if TOKENS in environ:
        parts.append("{} + {} tokens".format(*environ[TOKENS]))
    if KEY_NAME in environ:
        parts.append(f"key {environ[KEY_NAME]}")
    if "X-Request-Id" in headers:
        parts.append(f"id {headers['X-Request-Id']}")
    return ", ".join(parts)

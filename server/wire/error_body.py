"""Exception -> HTTP status and OpenAI's error object, for a whole answer or inside a stream.

This file does not know Flask: the same body stands in a response and in an SSE event.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from enginehouse.runtime.errors import HostUnavailable, RequestError, one_line

RETRY_AFTER_S = 5  # the host restarts with backoff: sooner is rarely useful

_MAX_CHARS = 1000
_MAX_PARAM_CHARS = 200

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ErrorAnswer(NamedTuple):
    """retry_after_s: of the header, where the status has one."""

    status: int
    body: dict[str, Any]
    retry_after_s: int = RETRY_AFTER_S


def error_answer(error: BaseException, request_id: str) -> ErrorAnswer:
    """The answer to any exception; what is not meant for users tells only the request id."""
    if isinstance(error, RequestError):
        answer = make_error(error.status, error.message, param=error.param, code=error.code)
        return answer._replace(retry_after_s=error.retry_after_s or RETRY_AFTER_S)
    if isinstance(error, HostUnavailable):
        return make_error(503, f"the engine is not available: {error}", code="engine_unavailable")
    return make_error(
        500, f"the server failed on this request; its log has more under {request_id}"
    )


def make_error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> ErrorAnswer:
    """The message in one line, whatever of the request it quotes."""
    message = one_line(message, _MAX_CHARS)
    param = None if param is None else param[:_MAX_PARAM_CHARS]
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return ErrorAnswer(
        status, {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )

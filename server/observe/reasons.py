"""Why a request was not answered to its end: the few words that its metrics are told by.

A refusal is of the request, or for want of room; a cancel is of an answer that nobody waits for.
What failed in answering is neither. No word here is a client's.
"""

from __future__ import annotations

import gevent

from enginehouse.server.answer.completion import Completion, Generation

# By the error's code, where that says more than the status.
_OF_CODES = {
    "queue_full": "queue_full",
    "queue_timeout": "queue_timeout",
    "rate_limit_exceeded": "rate_limit",
    "engine_unavailable": "engine_unavailable",
    "model_not_found": "model_not_found",
    "context_length_exceeded": "context_length",
}
_OF_STATUSES = {
    401: "unauthorized",
    404: "not_served",
    405: "not_served",
    408: "body_timeout",
    413: "body_too_large",
    415: "media_type",
}
_INVALID, NOT_HTTP = "invalid", "not_http"
REFUSALS = (*_OF_CODES.values(), *dict.fromkeys(_OF_STATUSES.values()), _INVALID, NOT_HTTP)

CLIENT_GONE, SHUTDOWN = "client_gone", "shutdown"
CANCELS = (CLIENT_GONE, SHUTDOWN)
PHASES = ("queue", "prefill", "decode")


def refusal_reason(status: int, code: str | None) -> str | None:
    """One of REFUSALS; None for what is a failure of the server."""
    if reason := _OF_CODES.get(code or "") or _OF_STATUSES.get(status):
        return reason
    return _INVALID if 400 <= status < 500 else None


def cancel_reason(error: BaseException | None) -> str:
    """One of CANCELS. error: what ends the request; gunicorn ends greenlets that outlive
    graceful_timeout.
    """
    return SHUTDOWN if isinstance(error, gevent.GreenletExit) else CLIENT_GONE


def phase_of(completion: Completion, generation: Generation | None) -> str:
    """How far an answer has come: one of PHASES."""
    if completion.first_token_s is not None:
        return "decode"
    return "prefill" if generation is not None and generation.begun else "queue"

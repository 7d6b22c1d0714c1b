"""OpenAI's error object, which every endpoint makes -> Anthropic's. Knows no Flask.

Source: Anthropic's API reference, "Errors".
"""

from __future__ import annotations

from typing import Any

from enginehouse.server.wire.error_body import ErrorAnswer

# Of the types that error_body.py has; what stands in none of them has the same name in both.
_TYPES = {"service_unavailable": "overloaded_error"}
_BY_CODE = {"request_entity_too_large": "request_too_large", "request_timeout": "timeout_error"}
# By a refused field: with this, Anthropic's tool runners ask again, and send all messages.
_DETAILS = {"thread": {"error_code": "thread_unsupported_request"}}


def anthropic_error(error: dict[str, Any], request_id: str | None = None) -> dict[str, Any]:
    kind = _BY_CODE.get(error["code"] or "") or _TYPES.get(error["type"], error["type"])
    told = {"type": kind, "message": error["message"]}
    if (details := _DETAILS.get(error["param"] or "")) is not None:
        told["details"] = details
    return {"type": "error", "error": told, "request_id": request_id}


def as_anthropics(answer: ErrorAnswer, request_id: str) -> ErrorAnswer:
    return answer._replace(body=anthropic_error(answer.body["error"], request_id))

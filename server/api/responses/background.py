"""A response that nobody waits for on the line: run to its end, or until it is asked to end.

Source: OpenAI's guide "Background mode".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from enginehouse.runtime.errors import HostUnavailable, RequestError
from enginehouse.server.answer.completion import ClientGone, Generation
from enginehouse.server.api.responses.answer import ResponseAnswer
from enginehouse.server.http.rate_limits import Ticket
from enginehouse.server.http.service import Service
from enginehouse.server.wire.error_body import error_answer

LOG = logging.getLogger("enginehouse.server")
POLL_S = 0.25  # how often it is looked whether it should end


def run_apart(
    service: Service,
    answer: ResponseAnswer,
    generation: Generation | None,
    request_id: str,
    wants_cancel: Callable[[], bool],
    ticket: Ticket | None,
) -> None:
    """ticket: of the key that asked. Never raises but what ends its greenlet."""
    looked_s = time.monotonic()
    service.lanes.begin(answer, generation, request_id)
    try:
        for _ in answer.run(generation, POLL_S):
            if generation is None or time.monotonic() - looked_s < POLL_S:
                continue
            looked_s = time.monotonic()
            if wants_cancel():
                generation.cancel()
        answer.whole()
    except ClientGone:
        answer.fail("", "", "cancelled")
    except Exception as error:  # there is nobody further out
        if not isinstance(error, (HostUnavailable, RequestError)):
            LOG.exception("response %s failed", request_id, extra={"request_id": request_id})
        told = error_answer(error, request_id).body["error"]
        answer.fail(told["code"] or "server_error", told["message"])
    finally:
        service.count(answer, generation, {})
        if ticket is not None:
            ticket.end(answer.num_prompt_tokens + answer.num_completion_tokens)

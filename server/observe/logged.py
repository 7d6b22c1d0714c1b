"""What the log tells of a request beside a line's own words: its id, its key's name, its model.

Text lines leave it out. Knows no endpoint; a prompt is told only where the settings ask for that.
"""

from __future__ import annotations

import logging

from flask import has_request_context, request

from enginehouse.server.wire.responses import log_fields

LOG = logging.getLogger("enginehouse.server")
_MOST_PROMPT = 20_000  # characters


class RequestFields(logging.Filter):
    """Adds the fields of the request at hand to what is logged while it is answered. A stream's
    lines are of later, and bring their own.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if has_request_context():
            for name, value in log_fields(request.environ).items():
                setattr(record, name, value)
        return True


def log_prompt(text: str) -> None:
    """The beginning of a prompt, as the model gets it."""
    told = text[:_MOST_PROMPT]
    fields = {"event": "prompt", "prompt": told, "prompt_chars": len(text)}
    LOG.info("prompt of %d characters: %s", len(text), ascii(told), extra=fields)

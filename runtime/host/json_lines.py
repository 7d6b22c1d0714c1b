"""Log records as JSON, an object on each line, by structlog.

time is ISO 8601 in UTC; what a caller hands over as `extra` stands beside it, and an `event` there
in the place of the message. ASCII alone: no terminal obeys it. Knows nothing of what is logged.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone

from structlog.processors import JSONRenderer, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.typing import EventDict, WrappedLogger


def json_formatter() -> logging.Formatter:
    return ProcessorFormatter(
        foreign_pre_chain=[ExtraAdder()], processors=[_head, format_exc_info, JSONRenderer()]
    )


def _head(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What every line has, before what this one has."""
    record: logging.LogRecord = event.pop("_record")
    del event["_from_structlog"]
    time = datetime.fromtimestamp(record.created, timezone.utc)
    head = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "process": record.process,
        "event": event.pop("event"),
    }
    return {**head, **event}

"""A batch as it begins. Source: OpenAI's API reference, "The batch object"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.wire.ids import Json, new_id

ENDED = ("completed", "failed", "cancelled", "expired")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_MOMENTS = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *("cancelling_at", "cancelled_at"),
)


def seconds_of(window: str) -> int:
    parts = re.fullmatch(r"([1-9][0-9]{0,3})([mhd])", window)
    if parts is None:
        raise EnginehouseError(f"{window!r} is no time; wanted one such as 90m, 24h or 7d")
    return int(parts[1]) * _SECONDS[parts[2]]


def new_batch(
    input_file_id: str,
    endpoint: str,
    window: str,
    metadata: Mapping[str, Any],
    now: int,
    model: str,
) -> Json:
    """window: such as 90m, 24h or 7d. now: seconds since 1970."""
    return {
        "id": new_id("batch"),
        "object": "batch",
        "endpoint": endpoint,
        "model": model,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + seconds_of(window),
        **dict.fromkeys(_MOMENTS),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": dict(metadata),
    }

"""POST /v1/batches: the form of its body, and of a line of its input file.

Source: OpenAI's API reference, "Batch"; its guide "Batch API".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from enginehouse.server.api.responses.body import Metadata
from enginehouse.server.wire.shapes import Body, Shape

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)


class BatchBody(Body):
    """POST /v1/batches"""

    advice = {}

    input_file_id: str
    """A file of purpose batch: a request on each line."""
    endpoint: Endpoint
    """That of every line."""
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}[mhd]$")] = "24h"
    """What is not answered by then has expired."""
    metadata: Metadata = {}
    """Kept with the batch."""


class BatchLine(Shape):
    """A line of the input file."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    """By which its answer is known; no other line has it."""
    method: Literal["POST"]
    url: str
    """The batch's endpoint."""
    body: dict[str, Any]
    """What would be sent there; without stream."""

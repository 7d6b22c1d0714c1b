"""The form of what is told of files and batches, for the OpenAPI document.

tests/server/test_openapi.py holds the real answers against these.
"""

from __future__ import annotations

from typing import Literal

from enginehouse.server.api.batches.body import Endpoint
from enginehouse.server.wire.answers import AnswerShape

BatchStatus = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]


class FileObject(AnswerShape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class DeletedFile(AnswerShape):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class FileList(AnswerShape):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(AnswerShape):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(AnswerShape):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(AnswerShape):
    total: int
    completed: int
    failed: int


class BatchUsage(AnswerShape):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    estimated_cost: float


class BatchObject(AnswerShape):
    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str]


class BatchList(AnswerShape):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

"""The form of what is told of responses and conversations, for the OpenAPI document.

tests/server/test_openapi.py holds the real answers against these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from enginehouse.server.wire.answers import AnswerShape

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseItem(AnswerShape):
    """An item; which fields it has is its type's, as in the body."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str
    type: Literal["message", "function_call", "function_call_output", "reasoning"]


class InputTokensDetails(AnswerShape):
    cached_tokens: int


class OutputTokensDetails(AnswerShape):
    reasoning_tokens: int


class ResponseUsage(AnswerShape):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    estimated_cost: float


class ResponseError(AnswerShape):
    code: str
    message: str


class IncompleteDetails(AnswerShape):
    reason: Literal["max_output_tokens"]


class ConversationReference(AnswerShape):
    id: str


class ResponseObject(AnswerShape):
    """What was asked stands in it again."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: ConversationReference | None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: bool
    temperature: float | int
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | int
    presence_penalty: float | int
    frequency_penalty: float | int
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


class ResponseEvent(AnswerShape):
    """An event of a stream; its name is its type."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    sequence_number: int


class Conversation(AnswerShape):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ItemList(AnswerShape):
    object: Literal["list"]
    data: list[ResponseItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(AnswerShape):
    id: str
    object: Literal["response", "conversation.deleted"]
    deleted: Literal[True]

"""The form of what is told of messages, for the OpenAPI document.

tests/server/test_openapi.py holds the real answers against these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from enginehouse.server.wire.answers import AnswerShape


class ContentBlock(AnswerShape):
    """text, thinking or tool_use; which fields it has is its type's."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "thinking", "tool_use"]


class ThinkingTokens(AnswerShape):
    thinking_tokens: int


class MessageUsage(AnswerShape):
    """input_tokens: without those of a cached prefix."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: None
    output_tokens: int
    output_tokens_details: ThinkingTokens
    server_tool_use: None
    service_tier: Literal["standard"]
    inference_geo: None
    estimated_cost: float


class AnthropicMessage(AnswerShape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


class AnthropicEvent(AnswerShape):
    """An event of a stream; its name is its type."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class TokenCount(AnswerShape):
    input_tokens: int


class AnthropicError(AnswerShape):
    type: Literal["error"]
    error: dict[str, Any]
    request_id: str | None

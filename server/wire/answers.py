"""The form of answers, for the OpenAPI document: what the forms of api/ and the routes write.

tests/server/test_openapi.py holds the real answers against these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class AnswerShape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorObject(AnswerShape):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(AnswerShape):
    error: ErrorObject


class CachedTokens(AnswerShape):
    cached_tokens: int


class ReasoningTokens(AnswerShape):
    reasoning_tokens: int


class Usage(AnswerShape):
    """completion_tokens_details: where anything was thought."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None
    estimated_cost: float


class FunctionCall(AnswerShape):
    name: str
    arguments: str


class ToolCallMade(AnswerShape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(AnswerShape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[str]
    reasoning_content: str = ""
    tool_calls: list[ToolCallMade] = []


class TopLogprob(AnswerShape):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerShape):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(AnswerShape):
    """null stands where nothing is known: of an echoed prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(AnswerShape):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(AnswerShape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class TextChoice(AnswerShape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs = []


class _Completion(AnswerShape):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: Usage


class ChatCompletion(_Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs = []


class TextCompletion(_Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class _Chunk(AnswerShape):
    """One `data:` event of a stream; the last event is `data: [DONE]`."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: Usage | None = None


class CalledFunctionDelta(AnswerShape):
    name: str = ""
    arguments: str


class ToolCallDelta(AnswerShape):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunctionDelta


class MessageDelta(AnswerShape):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(AnswerShape):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class TextChunkChoice(AnswerShape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(_Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextChunk(_Chunk):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]


class ModelCard(AnswerShape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    permission: list[str]
    max_model_len: int | None
    quantization: str | None


class ModelList(AnswerShape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(AnswerShape):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class PromptText(AnswerShape):
    prompt: str


class TokenizerInfo(AnswerShape):
    """What tokenizer_config.json says, of which no more than this is sure."""

    model_config = ConfigDict(extra="allow", strict=True)

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int | None
    """The engine's context."""


class Version(AnswerShape):
    version: str


class HealthStatus(AnswerShape):
    status: str


_Now = Literal["queued", "prefill", "decode", "preempted"]
_End = Literal["stop", "length", "tool_calls", "cancelled", "error"]


class EngineLane(AnswerShape):
    """A sequence of the worker that tells. age_s: since its request came; first_token_s: from then
    to its first token.
    """

    request_id: str
    choice: int
    state: Literal[
        "queued",
        "prefill",
        "decode",
        "preempted",
        "stop",
        "length",
        "tool_calls",
        "cancelled",
        "error",
    ]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    age_s: float
    first_token_s: float | None


class EngineFacts(AnswerShape):
    """info: what runs, and its limits. manifest: how it was built."""

    info: dict[str, Any]
    manifest: dict[str, Any] | None


class EngineLook(AnswerShape):
    """One look at the engine; stats are the engine host's, of all workers."""

    object: Literal["engine.look"]
    ready: bool
    stands_still: bool
    stats: dict[str, float | None]
    kv_blocks: str | None
    """A digit for each block of the KV cache, or for 480 of them, evenly: 0 free, 1 free with a
    prefix that can be found, 2 held by a sequence, 3 by several; null where it is not known."""
    lanes: list[EngineLane]
    num_more_lanes: int
    """Beside those that are told one by one."""
    ended: list[EngineLane]
    """Since the look before."""
    engine: EngineFacts | None
    """In the first look, and after a restart."""

"""POST /v1/messages: the form of its body. Knows no Flask, no model, no meaning of a block.

`cache_control` may stand wherever Anthropic has it: prefixes are shared without being asked for.
Source: Anthropic's API reference, "Messages".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from enginehouse.server.wire.bodies import FUNCTION_NAME
from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refused_fields import ADVICE
from enginehouse.server.wire.shapes import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOOLS,
    Body,
    FreeObject,
    Number,
    Shape,
    check_text,
)

_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Cached(Shape):
    cache_control: FreeObject | None = None
    """No answer depends on it."""


def _as_blocks(value: object) -> object:
    """A text as its one block; a block of another kind is refused by its name."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    for index, block in enumerate(value if isinstance(value, list) else ()):
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in _BLOCKS:
            raise PydanticCustomError(
                "text_only",
                "found {found}; wanted one of {wanted}: images, documents and server tools are "
                "not read",
                {
                    "at": f"[{index}].type",
                    "found": found_text(kind),
                    "wanted": ", ".join(_BLOCKS),
                },
            )
        if kind == "text":
            check_text(block, index, "text")
    return value


class TextBlock(Cached):
    type: Literal["text"]
    text: str
    citations: list[Any] = []


Texts = Annotated[
    list[TextBlock],
    FailFast(),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class Block(Cached):
    """One block of a message; which fields it has is its type's."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str = ""
    citations: list[Any] = []
    id: str | None = None
    """Of a call."""
    name: Annotated[str | None, Field(pattern=FUNCTION_NAME)] = None
    """Of a call."""
    input: FreeObject = {}
    """Of a call: its arguments."""
    caller: FreeObject | None = None
    tool_use_id: str | None = None
    """Of a result: the call that it is of."""
    content: Texts = []
    """Of a result."""
    is_error: bool = False
    """Of a result: its text is told as an error."""
    thinking: str = ""
    """Of what was thought."""
    signature: str = ""
    """Nothing here writes one, and none is read."""
    data: str = ""


Blocks = Annotated[
    list[Block],
    FailFast(),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
]


class TurnMessage(Shape):
    role: Literal["user", "assistant", "system"]
    content: Blocks
    """A text, or blocks."""


class ToolDefinition(Cached):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str = ""
    input_schema: FreeObject
    """The JSON schema of the arguments."""
    strict: bool = False
    """Hold calls to the schema."""
    eager_input_streaming: bool = False
    """Arguments are always sent as they come."""
    input_examples: list[Any] = []


def _only_custom(value: object) -> object:
    for index, tool in enumerate(value if isinstance(value, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise PydanticCustomError(
                "hosted_tool",
                'found {found}; wanted "custom": server tools are not served',
                {"at": f"[{index}].type", "found": found_text(kind)},
            )
    return value


class ToolMode(Shape):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """With tool."""
    disable_parallel_tool_use: bool = False
    """At most one call is made."""


class Thinking(Shape):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    """Is checked; X-Ignored-Fields names it: max_tokens bounds thought and answer together."""
    display: Literal["summarized", "full", "omitted"] | None = None
    """omitted: what was thought is not told. Nothing is summarised."""


class JsonFormat(Shape):
    type: Literal["json_schema"]
    schema_: Annotated[FreeObject, Field(alias="schema")]
    """The JSON schema the whole answer follows."""


class OutputConfig(Shape):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Reaches chat templates that read it."""
    format: JsonFormat | None = None


class UserMetadata(Shape):
    user_id: str | None = None
    """Is checked; no answer depends on it."""


class CountBody(Cached, Body):
    """POST /v1/messages/count_tokens"""

    advice = {name: idle for name, idle in ADVICE.items() if name != "metadata"}
    wanted = {
        "content": "a string or a list of blocks",
        "input_schema": "a JSON schema",
        "max_tokens": "an integer",
        "system": "a string or a list of text blocks",
        "tools": "a list of tools",
    }
    refused = {"mcp_servers": ([],), "container": (), "thread": ()}

    model: str
    """The served name, or one of the engine's own names."""
    messages: Annotated[list[TurnMessage], FailFast(), Field(min_length=1)]
    system: Texts = []
    """A text, or blocks of text, before all messages."""
    tools: Annotated[
        list[ToolDefinition],
        FailFast(),
        Field(max_length=MAX_TOOLS),
        BeforeValidator(_only_custom, json_schema_input_type=list[ToolDefinition]),
    ] = []
    tool_choice: ToolMode = ToolMode(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    """disabled: thinking is turned off where the chat template can, and not told."""
    output_config: OutputConfig = OutputConfig()
    output_format: JsonFormat | None = None
    """The older place of output_config.format."""


class MessagesBody(CountBody):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """Also bounded by what the context has left."""
    stream: bool = False
    """Answer by server-sent events."""
    stop_sequences: Annotated[list[Stop], FailFast(), Field(max_length=MAX_STOPS)] = []
    """The answer ends before the first of these texts."""
    temperature: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """0 is greedy."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1000)] = 0
    """0 is off."""
    metadata: UserMetadata = UserMetadata()
    service_tier: Literal["auto", "standard_only"] = "auto"

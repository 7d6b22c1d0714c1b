"""POST /v1/responses: the form of its body, and of the items that its input is made of.

Knows no Flask, no model, and not what an item means to a template.
Source: OpenAI's API reference, "Responses"; the Open Responses specification.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from enginehouse.server.wire.bodies import FUNCTION_NAME
from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refused_fields import ADVICE, UNSUPPORTED
from enginehouse.server.wire.shapes import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    MAX_TOOLS,
    FreeObject,
    SamplingFields,
    Shape,
    check_text,
)

MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_CHARS = 16, 64, 512
Name = Annotated[str, Field(pattern=FUNCTION_NAME)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
Mode = Literal["none", "auto", "required"]


class ItemText(Shape):
    """A piece of text, whoever said it. text: or refusal, of one that is a refusal."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


def _read_parts(value: object) -> object:
    """A text as its one part; a part that is no text is refused by its name."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    for index, part in enumerate(value if isinstance(value, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXTS:
            raise PydanticCustomError(
                "text_only",
                "found {found}; this engine reads text only: leave images, audio and files out",
                {"at": f"[{index}].type", "found": found_text(kind)},
            )
        if isinstance(kind, str):
            check_text(part, index, "refusal" if kind == "refusal" else "text")
    return value


Parts = Annotated[
    list[ItemText],
    FailFast(),
    BeforeValidator(_read_parts, json_schema_input_type=str | list[ItemText]),
]


class Item(Shape):
    """One item of a conversation; which fields it has is its type's."""

    type: Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    """Of a message."""
    content: Parts = []
    """Of a message, or of what was thought."""
    phase: str | None = None
    """Of a message of the assistant; no prompt depends on it."""
    call_id: str | None = None
    """Of a call, and of what came of it."""
    name: str | None = None
    """Of a call."""
    namespace: str | None = None
    """Of a call: the group of its function."""
    arguments: str = ""
    """Of a call: a JSON object, as text."""
    output: Parts = []
    """Of what came of a call."""
    summary: Parts = []
    """Of what was thought."""
    encrypted_content: str | None = None
    """Of what was thought: nothing here writes any, and none is read."""


def _read_items(value: object) -> object:
    """A text as the user's message; an item without a type is a message, as OpenAI has it."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError(
            "prompt",
            "found {found}; wanted a string or a list of items",
            {"found": found_text(value)},
        )
    items: list[object] = []
    for index, item in enumerate(value):
        if isinstance(item, dict) and item.get("type") is None and {"role", "id"} & item.keys():
            kind = "message" if "role" in item else "item_reference"
            item = {**item, "type": kind}
        given = item.get("type") if isinstance(item, dict) else None
        if isinstance(given, str) and given not in _ITEMS:
            raise PydanticCustomError(
                "item",
                "found {found}; wanted one of {wanted}: none of hosted or custom tools",
                {
                    "at": f"[{index}].type",
                    "found": found_text(given),
                    "wanted": ", ".join(_ITEMS),
                },
            )
        items.append(item)
    return items


Items = Annotated[
    list[Item], FailFast(), BeforeValidator(_read_items, json_schema_input_type=str | list[Item])
]


class FunctionTool(Shape):
    type: Literal["function"]
    name: Name
    description: str = ""
    parameters: FreeObject = {}
    """The JSON schema of the arguments."""
    strict: bool = False
    """Hold calls to the schema."""
    namespace: Name | None = None
    """The group that it stands in, which an item that calls it names too."""

    @property
    def full_name(self) -> str:
        """What the model calls it by."""
        return full_name(self.namespace, self.name)


def full_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}.{name}"


def _only_functions(value: object) -> object:
    """Groups of functions as the functions themselves, each with its group's name."""
    if not isinstance(value, list):
        return value
    tools: list[object] = []
    for index, tool in enumerate(value):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            inner = tool["tools"]
            for number, each in enumerate(inner):
                inner_kind = each.get("type") if isinstance(each, dict) else each
                if inner_kind != "function":
                    place = f"[{index}].tools[{number}].type"
                    raise PydanticCustomError(
                        "hosted_tool",
                        'found {found}; wanted "function"',
                        {"at": place, "found": found_text(inner_kind)},
                    )
                tools.append({**each, "namespace": tool.get("name")})
            continue
        tools.append(tool)
        if isinstance(kind, str) and kind != "function":
            raise PydanticCustomError(
                "hosted_tool",
                'found {found}; wanted "function": hosted and custom tools are not served',
                {"at": f"[{index}].type", "found": found_text(kind)},
            )
    return tools


class FunctionChoice(Shape):
    type: Literal["function"]
    name: Name


class AllowedTools(Shape):
    type: Literal["allowed_tools"]
    mode: Mode = "auto"
    tools: Annotated[list[FunctionChoice], FailFast(), Field(min_length=1, max_length=MAX_TOOLS)]


def _read_tool_choice(value: object) -> object:
    """A mode, the name of a function, or the names of some of them."""
    if isinstance(value, str) and value in get_args(Mode):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "function":
        inner = value.get("function")  # as chat has it
        name = inner.get("name") if isinstance(inner, dict) else value.get("name")
        if isinstance(name, str):
            return FunctionChoice.model_construct(type="function", name=name)
    if isinstance(value, dict) and kind == "allowed_tools":
        mode, tools = value.get("mode", "auto"), value.get("tools")
        given = tools if isinstance(tools, list) else []
        names = [tool.get("name") for tool in given if isinstance(tool, dict)]
        if mode in get_args(Mode) and names and all(isinstance(name, str) for name in names):
            allowed = [FunctionChoice.model_construct(type="function", name=n) for n in names]
            return AllowedTools.model_construct(type="allowed_tools", mode=mode, tools=allowed)
        raise PydanticCustomError(
            "tool_choice",
            'found allowed_tools of another form; wanted a mode ("auto" or "required") and tools, '
            "each an object with the name of a function",
        )
    raise PydanticCustomError(
        "tool_choice",
        'found {found}; wanted "none", "auto", "required", or an object that names a function or '
        "the allowed_tools",
        {"found": found_text(value if kind is None else kind)},
    )


ToolChoice = Mode | FunctionChoice | AllowedTools


class TextFormat(Shape):
    """name to strict: with json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str | None, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = None
    description: str = ""
    schema_: Annotated[FreeObject | None, Field(alias="schema")] = None
    strict: bool = False
    """Refuse a schema of which something cannot be enforced."""


class TextOptions(Shape):
    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None
    """Is checked; X-Ignored-Fields names it."""


class ReasoningOptions(Shape):
    effort: Effort | None = None
    """Reaches chat templates that read it; none turns thinking off where they can."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """What was thought is told whole, and no summary of it is made."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The older name of summary."""


REFUSED = {
    **UNSUPPORTED,
    "context_management": ([],),
    "messages": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt": (),
}


class ConversationId(Shape):
    id: str


def _conversation(value: object) -> object:
    return {"id": value} if isinstance(value, str) else value


def _few_texts(value: object) -> object:
    """OpenAI's bounds of metadata."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_METADATA:
        raise PydanticCustomError(
            "too_many", f"found {len(value)} entries; wanted at most {MAX_METADATA}"
        )
    for key, item in value.items():
        if (
            not isinstance(item, str)
            or len(item) > MAX_METADATA_CHARS
            or len(key) > MAX_METADATA_KEY
        ):
            raise PydanticCustomError(
                "metadata",
                "found {found}; wanted a string of at most {most} characters under a name of at "
                "most {name}",
                {
                    "at": f".{key[:MAX_METADATA_KEY]}",
                    "found": found_text(item),
                    "most": MAX_METADATA_CHARS,
                    "name": MAX_METADATA_KEY,
                },
            )
    return value


Metadata = Annotated[dict[str, Any], BeforeValidator(_few_texts)]


WANTED = {
    "input": "a string or a list of items",
    "items": "a list of items",
    "metadata": "an object",
    "output": "a string or a list of text parts",
    "tools": "a list of tools",
}


class ResponsesBody(SamplingFields):
    """POST /v1/responses"""

    refused = REFUSED
    foreign = ("best_of", "max_tokens", "n", "prompt_logprobs", "response_format")
    wanted = WANTED
    advice = {name: idle for name, idle in ADVICE.items() if name not in ("metadata", "store")}

    input: Items
    """A text, or items: messages, calls of functions and what came of them, what was thought."""
    instructions: str = ""
    """A system message before all of the input; not kept for responses that follow."""
    previous_response_id: str | None = None
    """A stored response whose conversation goes on."""
    conversation: Annotated[
        ConversationId | None,
        BeforeValidator(_conversation, json_schema_input_type=str | ConversationId | None),
    ] = None
    """A conversation whose items come before, and to which this response is added."""
    tools: Annotated[
        list[FunctionTool],
        FailFast(),
        Field(max_length=MAX_TOOLS),
        BeforeValidator(_only_functions, json_schema_input_type=list[FunctionTool]),
    ] = []
    tool_choice: Annotated[
        Any,
        BeforeValidator(_read_tool_choice, json_schema_input_type=ToolChoice),
    ] = "auto"
    parallel_tool_calls: bool = True
    """false: at most one call is made."""
    max_tool_calls: Annotated[int | None, Field(ge=1)] = None
    """Of hosted tools, of which there are none; X-Ignored-Fields names it."""
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    max_output_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    """Also bounded by what the context has left."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: the oldest items that do not fit the context are left out."""
    include: list[str] = []
    """message.output_text.logprobs: tell log probabilities."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    """And of so many of the likeliest tokens in each place."""
    metadata: Metadata = {}
    """Kept with the response."""
    store: bool = True
    """Keep the response, so that it can be read and gone on with."""
    background: bool = False
    """Answer at once, and be asked for the response later."""
    chat_template_kwargs: FreeObject = {}
    """More variables for the chat template."""

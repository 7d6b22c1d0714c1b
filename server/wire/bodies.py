"""The body of each endpoint, as a form: which fields there are beside the shared ones of shapes.py.

Knows no Flask, no model, and not what a request means.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refused_fields import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    UNSUPPORTED_IN_TEMPLATES,
)
from enginehouse.server.wire.shapes import (
    MAX_CALLS,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_TOKENS,
    MAX_TOOLS,
    Body,
    FreeObject,
    SamplingFields,
    Shape,
    TokenList,
    bounded,
)
from enginehouse.server.wire.texts_or_ids import texts_or_ids

FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class TextPart(Shape):
    type: Literal["text"]
    text: str


class RefusalPart(Shape):
    """What an assistant said when it refused."""

    type: Literal["refusal"]
    refusal: str


def _text_as_parts(value: object) -> object:
    """A string as its one part, and a refusal as the text that it is."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        return value
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "text_only",
                "found {found}; this engine reads text only: leave images, audio and files out",
                {"at": f"[{index}].type", "found": found_text(kind)},
            )
    return [
        {"type": "text", "text": part.get("refusal")}
        if isinstance(part, dict) and part.get("type") == "refusal"
        else part
        for part in value
    ]


def _read_arguments(value: object) -> object:
    return bounded(value) if isinstance(value, (dict, list)) else value


# A list of five million wrong items costs one error, not five million.
_Parts = Annotated[list[TextPart], FailFast()]
_PartsForm = list[TextPart | RefusalPart]


class CalledFunction(Shape):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Annotated[
        Any, BeforeValidator(_read_arguments, json_schema_input_type=str | dict[str, Any])
    ] = ""
    """A JSON object, as text or as it is; empty text is an object without keys. Text of a call that
    was cut, or is no object's, is named in X-Repaired-Messages: where the chat template wants an
    object it is an empty one."""


class CalledTool(Shape):
    """A call that the assistant made earlier."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Shape):
    refused = {"audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        _Parts, BeforeValidator(_text_as_parts, json_schema_input_type=str | _PartsForm)
    ] = []
    """Text; may be absent of an assistant."""
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], FailFast(), Field(max_length=MAX_CALLS)] = []
    """Of an assistant: what it called."""
    tool_call_id: str | None = None
    """Of a tool: the call that it answers."""
    function_call: CalledFunction | None = None
    """Of an assistant: OpenAI's older form of one call; a message of role function answers it."""
    refusal: str | None = None
    """Of an assistant: its words, where it has no content."""
    reasoning_content: str | None = None
    """Of an assistant: what it thought; templates that know such text are given it."""
    reasoning: str | None = None
    """The same, as vLLM names it now."""
    prefix: bool = False
    """Of an assistant's final message: the answer goes on where it ends, as Mistral has it."""


class Function(Shape):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str = ""
    parameters: FreeObject = {}
    """The JSON schema of the arguments."""
    strict: bool = False


class Tool(Shape):
    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    name: str


class NamedTool(Shape):
    type: Literal["function"]
    function: NamedFunction


_ToolMode = Literal["none", "auto", "required"]


def _read_tool_choice(value: object) -> object:
    """A mode, or the name of a function as a NamedTool."""
    if isinstance(value, str) and value in get_args(_ToolMode):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            return NamedTool(type="function", function=NamedFunction(name=name))
    raise PydanticCustomError(
        "tool_choice",
        'found {found}; wanted "none", "auto", "required" or an object that names a function',
        {"found": found_text(value)},
    )


class TemplateFields(Shape):
    """How messages become a prompt."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    add_generation_prompt: bool | None = None
    """Open the assistant's turn: true, unless the final message is continued."""
    continue_final_message: bool = False
    """The answer goes on where the final message, an assistant's, ends."""
    chat_template_kwargs: FreeObject = {}
    """More variables for the chat template; X-Ignored-Fields names those that it does not read."""


class Prediction(Shape):
    """OpenAI's text that the answer is likely to repeat."""

    type: Literal["content"]
    content: Annotated[
        _Parts, BeforeValidator(_text_as_parts, json_schema_input_type=str | _PartsForm)
    ]


class ChatBody(TemplateFields, SamplingFields):
    """POST /v1/chat/completions"""

    refused = UNSUPPORTED_IN_CHAT

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Reaches chat templates that read it; none turns thinking off where they can."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Is checked; X-Ignored-Fields names it, as it does the two below."""
    prediction: Prediction | None = None
    store: bool = False

    max_completion_tokens: Annotated[int | None, Field(ge=0, le=MAX_TOKENS)] = None
    """OpenAI's newer name for max_tokens; both may be given when they are equal."""
    logprobs: bool = False
    """Tell the log probability of each token of the answer."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    """And of so many of the likeliest tokens in its place."""
    tools: Annotated[list[Tool], FailFast(), Field(max_length=MAX_TOOLS)] = []
    tool_choice: Annotated[
        Any, BeforeValidator(_read_tool_choice, json_schema_input_type=_ToolMode | NamedTool)
    ] = None
    parallel_tool_calls: bool = True
    """false: at most one call is made."""
    include_reasoning: bool = True
    """Tell the reasoning before the answer, where a model gives any."""
    separate_reasoning: bool | None = None
    """Tell it as reasoning_content, apart from the content; absent: as the engine is set."""


class CompletionBody(SamplingFields):
    """POST /v1/completions"""

    refused = UNSUPPORTED_IN_COMPLETIONS

    prompt: Annotated[
        list[Any],
        texts_or_ids(MAX_PROMPTS),
    ]
    """A text, texts, token ids, or lists of token ids."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 16
    """Also bounded by what the context has left."""
    echo: bool = False
    """Begin the text with the prompt."""
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    """Tell the log probability of each token, and of so many of the likeliest in its place; with
    echo the prompt's tokens too."""
    add_special_tokens: bool = True
    """Begin a prompt that is text as the tokenizer begins texts, with BOS if it does."""


class _TokenizeFields(Body):
    model: str | None = None
    return_token_strs: bool = False
    """Name each token too."""


class TokenizeBody(_TokenizeFields):
    """POST /tokenize, of a text."""

    prompt: str
    add_special_tokens: bool = True


class TokenizeChatBody(TemplateFields, _TokenizeFields):
    """POST /tokenize, of a conversation."""

    refused = UNSUPPORTED_IN_TEMPLATES

    tools: Annotated[list[Tool], FailFast(), Field(max_length=MAX_TOOLS)] = []
    add_special_tokens: bool = False


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: TokenList


class TemplateBody(TemplateFields, Body):
    """POST /apply-template"""

    refused = UNSUPPORTED_IN_TEMPLATES

    model: str | None = None
    tools: Annotated[list[Tool], FailFast(), Field(max_length=MAX_TOOLS)] = []

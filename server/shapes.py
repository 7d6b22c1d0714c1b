"""The form of a request body: each field's type, range and default, and the sentence for a breach.

The models below say what is well formed; what a well-formed request may ask for is schema.py's.
This file does not know Flask, the model or any other field's value.
Source: the product page's "Input fields"; OpenAI's chat completion reference for the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from enginehouse.runtime.errors import RequestError

SEED_LIMIT = 9223372036854776000  # 2**63 as JavaScript prints it, which is how the page states it
MAX_STOPS = 16


def _text_as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _text_as_stops(value: object) -> object:
    if value == "":
        raise PydanticCustomError("stop_empty", 'stop: "" is empty; wanted a non-empty string')
    return [value] if isinstance(value, str) else value


class Shape(BaseModel):
    """Strict numbers, null means absent, unknown fields are kept apart in model_extra."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class TextPart(Shape):
    type: Literal["text"]
    text: str


# FailFast: a list of five million wrong items costs one error, not five million.
_Parts = Annotated[list[TextPart], FailFast(), Field(min_length=1)]


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[_Parts, BeforeValidator(_text_as_parts)] = []
    name: str | None = None
    tool_calls: list[Any] = []
    tool_call_id: str | None = None


class Function(Shape):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Shape):
    type: Literal["function"]
    function: Function


class JsonSchema(Shape):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool = False


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(Shape):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: no text depends on it


_Number = Annotated[float, Field(allow_inf_nan=False)]
_MaxTokens = Annotated[int | None, Field(ge=0, le=1_000_000)]
_Stop = Annotated[str, Field(min_length=1)]
_Stops = Annotated[list[_Stop], FailFast(), Field(max_length=MAX_STOPS)]


class Body(Shape):
    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[_Number, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[_Number, Field(ge=0, le=1)] = 0.0
    top_k: Annotated[int, Field(ge=0, lt=1000)] = 0
    max_tokens: _MaxTokens = None
    max_completion_tokens: _MaxTokens = None
    stop: Annotated[_Stops, BeforeValidator(_text_as_stops)] = []
    n: Annotated[int, Field(ge=1, le=4)] = 1
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=5)] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=SEED_LIMIT)] = None
    user: str | None = None
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: Any = None
    response_format: ResponseFormat = ResponseFormat()
    # No answer depends on the fields below, so they are checked and then left alone.
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    service_tier: str = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""


_WANTED_TYPE = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
WANTED_FIELD = {
    "content": "a string or a list of text parts",
    "function": "an object with the function's name",
    "json_schema": "an object with a name and a schema",
    "messages": "a list of messages",
    "stop": f"a string or a list of up to {MAX_STOPS} non-empty strings",
}


def parse_body(body: bytes, max_messages: int | None = None) -> Body:
    """Read one request body; RequestError names the first field that is not well formed.

    max_messages: what no context can hold is refused before each message is looked at.
    """
    data = _decode_json(body)
    messages = data.get("messages")
    if max_messages is not None and isinstance(messages, list) and len(messages) > max_messages:
        raise RequestError(
            f"messages: found {len(messages)} messages; wanted at most {max_messages}, as each "
            f"takes a token and more of the context of {max_messages} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    try:
        return Body.model_validate(data)
    except ValidationError as error:
        _refuse_first(error.errors(include_url=False))


def _decode_json(body: bytes) -> dict[str, Any]:
    """The body's object: msgspec refuses NaN, lone surrogates and numbers beyond a double."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError(
            "the body is nested too deeply; wanted a chat completion request", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise RequestError(
            f"the body is {found_text(value)}; wanted a JSON object", code="invalid_type"
        )
    return value


def _refuse_first(errors: list[ErrorDetails]) -> NoReturn:
    """Turn pydantic's first error into our sentence: the thing, what was found, what is wanted."""
    error = errors[0]
    param = _path(error["loc"])
    field = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "")
    kind, found, context = error["type"], found_text(error["input"]), error.get("ctx", {})
    code = "invalid_value"
    if kind == "missing":
        message = f"{param}: missing; wanted {WANTED_FIELD.get(field, 'a string')}"
        code = "missing_required_parameter"
    elif kind in _WANTED_TYPE:
        at_field = error["loc"][-1] == field
        wanted = WANTED_FIELD.get(field, "") if at_field else ""
        message = f"{param}: found {found}; wanted {wanted or _WANTED_TYPE[kind]}"
        code = "invalid_type"
    elif kind == "literal_error":
        wanted = context["expected"].replace("'", '"')
        message = f"{param}: {found} is not supported; wanted {wanted}"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        message = f"{param}: {found} is out of range; wanted {_range_of(field)}"
    elif kind == "too_long":
        message = (
            f"{param}: found {context['actual_length']} items; wanted at most "
            f"{context['max_length']}"
        )
    elif kind in ("too_short", "string_too_short"):
        message = f"{param}: {found} is empty; wanted at least one {_item_of(field)}"
    elif kind == "string_pattern_mismatch":
        message = f"{param}: {found} is not a name; wanted {context['pattern']}"
    else:
        message = error["msg"]
    raise RequestError(message, param=param, code=code)


def _range_of(field: str) -> str:
    """The range of a numeric field of the body, in words: `0 <= temperature <= 2`."""
    lower = upper = ""
    for bound in Body.model_fields[field].metadata:
        if hasattr(bound, "ge"):
            lower = f"{bound.ge} <= "
        elif hasattr(bound, "gt"):
            lower = f"{bound.gt} < "
        elif hasattr(bound, "le"):
            upper = f" <= {bound.le}"
        elif hasattr(bound, "lt"):
            upper = f" < {bound.lt}"
    return f"{lower}{field}{upper}"


def _item_of(field: str) -> str:
    return {"messages": "message", "content": "text part"}.get(field, "character")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def found_text(value: object) -> str:
    """A short JSON-like picture of a value; never descends, so depth and size cannot hurt."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        cut = value if len(value) <= 60 else value[:57] + "..."
        return f'"{cut}"'
    if isinstance(value, (int, float)):
        text = str(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return "an object" if isinstance(value, dict) else "a list"

"""Bytes -> a validated body, or the one sentence that says which field is at fault and why.

Pydantic's first error becomes a RequestError: the field's path, what was found, what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from enginehouse.runtime.errors import RequestError
from enginehouse.server.wire.json_body import decode_json, found_text, join
from enginehouse.server.wire.shapes import MAX_STOPS, Shape

S = TypeVar("S", bound=Shape)

_MAX_PARAM_CHARS = 200
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
    "input": "a string, a list of strings, or token ids",
    "json_schema": "an object with a name and a schema",
    "messages": "a list of messages",
    "prompt": "a string, a list of strings, or token ids",
    "schema": "a JSON schema",
    "stop": f"a string or a list of up to {MAX_STOPS} non-empty strings",
    "tokens": "a list of token ids",
}


def parse_body(model: type[S], body: bytes, check: Callable[[dict[str, Any]], None]) -> S:
    """Read one request body; RequestError names the first field that is not well formed.

    check: looks at the object before its fields are, to refuse early what would take long.
    """
    data = decode_json(body)
    check(data)
    return validate(model, data)


def validate(model: type[S], data: dict[str, Any]) -> S:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        _refuse_first(model, error.errors(include_url=False))


def refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    """The sentence begins with the field's path."""
    raise RequestError(f"{param}: {message}", param=param, code=code)


def _refuse_first(model: type[Shape], errors: list[ErrorDetails]) -> NoReturn:
    error = errors[0]
    location = tuple(part for part in error["loc"] if part != "[key]")
    kind, found, context = error["type"], found_text(error["input"]), error.get("ctx", {})
    at = str(context.get("at", ""))  # beyond the location
    param = (_path(location) + at)[:_MAX_PARAM_CHARS]
    field = next((str(part) for part in reversed(location) if isinstance(part, str)), "")
    code, words = "invalid_value", {**WANTED_FIELD, **model.wanted}
    if kind == "missing":
        wanted = words.get(at.rpartition(".")[2] or field, "a string")
        refuse(param, f"missing; wanted {wanted}", "missing_required_parameter")
    if kind in _WANTED_TYPE:
        wanted = words.get(field, "") if location[-1] == field else ""
        refuse(param, f"found {found}; wanted {wanted or _WANTED_TYPE[kind]}", "invalid_type")
    if kind == "literal_error":
        message = f"{found} is not supported; wanted {context['expected']}".replace("'", '"')
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        message = f"{found} is out of range; wanted {_range_of(model, location, context)}"
    elif kind in ("too_long", "string_too_long"):
        num = context.get("actual_length") or len(error["input"])
        unit = "characters" if kind == "string_too_long" else "items"
        message = f"found {num} {unit}; wanted at most {context['max_length']}"
    elif kind in ("too_short", "string_too_short"):
        message = f"{found} is empty; wanted at least one {_item_of(field, kind)}"
    elif kind == "string_pattern_mismatch":
        message = f"{found} is not of the form {context['pattern']}"
    else:
        message = error["msg"]
        code = "invalid_type" if kind in ("prompt", "schema") else code
    refuse(param, message, code)


def _range_of(model: type[Shape], location: tuple[int | str, ...], context: dict[str, Any]) -> str:
    """The range in words, `0 <= temperature <= 2`; of a field within a field, the bound broken."""
    bounds = dict(context)
    field = str(location[-1])
    if len(location) == 1:
        for bound in model.model_fields[field].metadata:
            bounds |= {
                name: getattr(bound, name)
                for name in ("ge", "gt", "le", "lt")
                if hasattr(bound, name)
            }
    lower = (
        f"{bounds['ge']} <= " if "ge" in bounds else f"{bounds['gt']} < " if "gt" in bounds else ""
    )
    upper = (
        f" <= {bounds['le']}" if "le" in bounds else f" < {bounds['lt']}" if "lt" in bounds else ""
    )
    return f"{lower}{field if len(location) == 1 else 'value'}{upper}"


def _item_of(field: str, kind: str) -> str:
    if kind == "string_too_short":
        return "character"
    return {"messages": "message", "content": "text part"}.get(field, "item")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path = f"{path}[{part}]" if isinstance(part, int) else join(path, part)
    return path

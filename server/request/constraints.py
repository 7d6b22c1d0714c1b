"""Every name a client has for a grammar -> one runtime Constraint, or none.

OpenAI's response_format, vLLM's guided_* and structured_outputs. A request follows one grammar:
two of them are a contradiction, and refused. Grammars are compiled by the engine, not here.
Source: OpenAI's chat completion reference; vLLM's "Structured Outputs"; xgrammar's structural tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.server.wire.refusal import WANTED_FIELD, refuse, validate
from enginehouse.server.wire.shapes import (
    MAX_GRAMMAR_CHARS,
    ResponseFormat,
    SamplingFields,
    StructuredOutputs,
)

Kind = ConstraintKind


def read_constraint(fields: SamplingFields) -> Constraint | None:
    """The grammar that the request names; RequestError when it names two, or half of one."""
    first: Constraint | None = None
    for found in _constraints(fields):
        if len(found.value) > MAX_GRAMMAR_CHARS:
            refuse(
                found.param,
                f"found a grammar of {len(found.value)} characters; wanted at most "
                f"{MAX_GRAMMAR_CHARS}",
            )
        if first is not None:
            refuse(found.param, f"contradicts {first.param}; wanted one of the two")
        first = found
    return first


def _constraints(fields: SamplingFields) -> Iterator[Constraint]:
    if (constraint := _of_response_format(fields.response_format, "response_format")) is not None:
        yield constraint
    if fields.structured_outputs is not None:
        yield from _of_structured_outputs(fields.structured_outputs)
    if fields.guided_json is not None:
        yield _json_schema(fields.guided_json, "guided_json")
    if fields.guided_regex is not None:
        yield Constraint(Kind.REGEX, fields.guided_regex, "guided_regex")
    if fields.guided_choice:
        yield Constraint(Kind.CHOICE, _text_of(fields.guided_choice), "guided_choice")
    if fields.guided_grammar is not None:
        yield Constraint(Kind.EBNF, fields.guided_grammar, "guided_grammar")


def _of_response_format(wanted: ResponseFormat, param: str) -> Constraint | None:
    _refuse_fields_of_another_type(wanted, param)
    if wanted.type == "json_object":
        return Constraint(Kind.JSON_OBJECT, "", param)
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            _missing(f"{param}.json_schema", WANTED_FIELD["json_schema"])
        return _json_schema(wanted.json_schema.schema_, f"{param}.json_schema.schema")
    if wanted.type == "structural_tag":
        return Constraint(Kind.STRUCTURAL_TAG, _text_of(_structural_tag(wanted, param)), param)
    return None


def _refuse_fields_of_another_type(wanted: ResponseFormat, param: str) -> None:
    for field, owner in (
        ("json_schema", "json_schema"),
        ("format", "structural_tag"),
        ("structures", "structural_tag"),
        ("triggers", "structural_tag"),
    ):
        if getattr(wanted, field) and wanted.type != owner:
            refuse(f"{param}.{field}", f'contradicts type "{wanted.type}"; wanted type "{owner}"')


def _structural_tag(wanted: ResponseFormat, param: str) -> dict[str, Any]:
    """xgrammar's present form; the older one of structures and triggers is written anew."""
    if wanted.format is not None:
        if wanted.structures or wanted.triggers:
            refuse(f"{param}.format", "contradicts structures and triggers; wanted one form")
        return {"type": "structural_tag", "format": wanted.format}
    for field in ("structures", "triggers"):
        if not getattr(wanted, field):
            _missing(f"{param}.{field}", "a format, or structures and triggers")
    tags = [
        {
            "begin": tag.begin,
            "content": {"type": "json_schema", "json_schema": tag.schema_},
            "end": tag.end,
        }
        for tag in wanted.structures
    ]
    form = {"type": "triggered_tags", "triggers": wanted.triggers, "tags": tags}
    return {"type": "structural_tag", "format": form}


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Constraint]:
    here = "structured_outputs"
    found = []
    if wanted.json_ is not None:
        found.append(_json_schema(wanted.json_, f"{here}.json"))
    if wanted.json_object:
        found.append(Constraint(Kind.JSON_OBJECT, "", f"{here}.json_object"))
    if wanted.regex is not None:
        found.append(Constraint(Kind.REGEX, wanted.regex, f"{here}.regex"))
    if wanted.choice:
        found.append(Constraint(Kind.CHOICE, _text_of(wanted.choice), f"{here}.choice"))
    if wanted.grammar is not None:
        found.append(Constraint(Kind.EBNF, wanted.grammar, f"{here}.grammar"))
    if wanted.structural_tag is not None:
        param = f"{here}.structural_tag"
        try:
            form = validate(
                ResponseFormat,
                {**_object_of(wanted.structural_tag, param), "type": "structural_tag"},
            )
        except RequestError as error:
            raise RequestError(
                f"{here}.structural_tag.{error.message}",
                param=f"{param}.{error.param}",
                code=error.code,
            ) from None
        text = _text_of(_structural_tag(form, param))
        found.append(Constraint(Kind.STRUCTURAL_TAG, text, param))
    if not found:
        refuse(
            here,
            "found no grammar; wanted one of json, json_object, regex, choice, grammar, "
            "structural_tag",
        )
    yield from found


def _json_schema(value: Any, param: str) -> Constraint:
    return Constraint(Kind.JSON_SCHEMA, _text_of(_object_of(value, param)), param)


def _object_of(value: Any, param: str) -> dict[str, Any]:
    """An object, or the JSON text of one."""
    if isinstance(value, dict):
        return value
    try:
        data = msgspec.json.decode(value)
    except (msgspec.MsgspecError, RecursionError) as error:
        refuse(param, f"is not valid JSON: {error}")
    if not isinstance(data, dict):
        refuse(param, "wanted the JSON text of an object")
    return data


def _text_of(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _missing(param: str, wanted: str) -> NoReturn:
    refuse(param, f"missing; wanted {wanted}", "missing_required_parameter")

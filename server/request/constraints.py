"""Every name a client has for a grammar -> one runtime Constraint, or none.

OpenAI's response_format, vLLM's guided_* and structured_outputs, SGLang's regex and ebnf. A request
follows one grammar: two are a contradiction, and refused. Grammars are compiled by the engine, not
here.
Source: OpenAI's chat completion reference; vLLM's "Structured Outputs"; xgrammar's structural tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import msgspec

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.runtime.schemas.effort import limited
from enginehouse.runtime.schemas.plain import Plain
from enginehouse.server.tools.unenforced import Unenforced, plain_of, unenforced
from enginehouse.server.wire.refusal import WANTED_FIELD, refuse, validate
from enginehouse.server.wire.shapes import (
    MAX_GRAMMAR_CHARS,
    ResponseFormat,
    SamplingFields,
    StructuredOutputs,
)

Kind = ConstraintKind


class Bound(NamedTuple):
    """What the answer follows, and what its schema says besides."""

    constraint: Constraint
    unenforced: tuple[Unenforced, ...] = ()


def read_constraint(fields: SamplingFields) -> Bound | None:
    """The grammar that the request names; RequestError when it names two, or half of one."""
    first: Bound | None = None
    with limited():
        for bound in _constraints(fields):
            found = bound.constraint
            _check_size(found.value, found.param)
            if first is not None:
                refuse(found.param, f"contradicts {first.constraint.param}; wanted one of the two")
            first = bound
    return first


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        refuse(
            param, f"found a grammar of {len(text)} characters; wanted at most {MAX_GRAMMAR_CHARS}"
        )


def _constraints(fields: SamplingFields) -> Iterator[Bound]:
    if (bound := _of_response_format(fields.response_format, "response_format")) is not None:
        yield bound
    if fields.structured_outputs is not None:
        yield from _of_structured_outputs(fields.structured_outputs)
    if fields.guided_json is not None:
        yield _json_schema(fields.guided_json, "guided_json")
    if fields.guided_regex is not None:
        yield Bound(Constraint(Kind.REGEX, fields.guided_regex, "guided_regex"))
    if fields.guided_choice:
        yield Bound(Constraint(Kind.CHOICE, _text_of(fields.guided_choice), "guided_choice"))
    if fields.guided_grammar is not None:
        yield Bound(Constraint(Kind.EBNF, fields.guided_grammar, "guided_grammar"))
    if fields.regex is not None:
        yield Bound(Constraint(Kind.REGEX, fields.regex, "regex"))
    if fields.ebnf is not None:
        yield Bound(Constraint(Kind.EBNF, fields.ebnf, "ebnf"))


def _of_response_format(wanted: ResponseFormat, param: str) -> Bound | None:
    _refuse_fields_of_another_type(wanted, param)
    if wanted.type == "json_object" and wanted.schema_ is not None:
        return _json_schema(wanted.schema_, f"{param}.schema")
    if wanted.type == "json_object":
        return Bound(Constraint(Kind.JSON_OBJECT, "", param))
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            _missing(f"{param}.json_schema", WANTED_FIELD["json_schema"])
        schema, strict = wanted.json_schema.schema_, wanted.json_schema.strict
        return _json_schema(schema, f"{param}.json_schema.schema", strict)
    if wanted.type == "structural_tag":
        return _tagged(_structural_tag(wanted, param), param)
    return None


def _refuse_fields_of_another_type(wanted: ResponseFormat, param: str) -> None:
    for field, owner in (
        ("json_schema", "json_schema"),
        ("schema_", "json_object"),
        ("format", "structural_tag"),
        ("structures", "structural_tag"),
        ("triggers", "structural_tag"),
    ):
        if getattr(wanted, field) and wanted.type != owner:
            refuse(
                f"{param}.{field.rstrip('_')}",
                f'contradicts type "{wanted.type}"; wanted type "{owner}"',
            )


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


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Bound]:
    here = "structured_outputs"
    found = []
    if wanted.json_ is not None:
        found.append(_json_schema(wanted.json_, f"{here}.json"))
    if wanted.json_object:
        found.append(Bound(Constraint(Kind.JSON_OBJECT, "", f"{here}.json_object")))
    if wanted.regex is not None:
        found.append(Bound(Constraint(Kind.REGEX, wanted.regex, f"{here}.regex")))
    if wanted.choice:
        choice = _text_of(wanted.choice)
        found.append(Bound(Constraint(Kind.CHOICE, choice, f"{here}.choice")))
    if wanted.grammar is not None:
        found.append(Bound(Constraint(Kind.EBNF, wanted.grammar, f"{here}.grammar")))
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
        found.append(_tagged(_structural_tag(form, param), param))
    if not found:
        refuse(
            here,
            "found no grammar; wanted one of json, json_object, regex, choice, grammar, "
            "structural_tag",
        )
    yield from found


def _json_schema(value: Any, param: str, strict: bool = False) -> Bound:
    schema = _object_of(value, param)
    _check_size(_text_of(schema), param)
    plain = _plain(schema, param, strict)
    constraint = Constraint(Kind.JSON_SCHEMA, _text_of(plain.schema), param)
    return Bound(constraint, unenforced(schema, plain, param))


def _plain(schema: Any, param: str, strict: bool = False) -> Plain:
    """The schema as it is enforced; RequestError where it cannot be: all of it, when strict."""
    try:
        return plain_of(schema, strict)
    except SchemaError as error:
        refuse(param, str(error))


def _tagged(tag: Any, param: str) -> Bound:
    """A structural tag, whose schemas are enforced as far as they can be."""
    left_out: list[str] = []

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(item) for item in part]
        if not isinstance(part, dict):
            return part
        result = {key: plain(value) for key, value in part.items() if key != "json_schema"}
        if "json_schema" in part:
            made = _plain(part["json_schema"], param)
            left_out.extend(made.left_out)
            result["json_schema"] = made.schema
        return result

    constraint = Constraint(Kind.STRUCTURAL_TAG, _text_of(plain(tag)), param)
    paths = tuple(f"{param}.{path}" for path in left_out)
    return Bound(constraint, (Unenforced(paths),) if paths else ())


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

"""A request's Constraint -> the text that xgrammar is given, refused early where that can be seen.

Size, nesting and keywords are looked at here, in microseconds; what only compiling can tell is
found out in a process of its own (`compiler.py`). Imports neither torch nor xgrammar.
"""

from __future__ import annotations

import json
import re
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.json_schema import MAX_DEPTH, exact_schema
from enginehouse.runtime.grammar.regex_classes import spell_out
from enginehouse.runtime.grammar.support import TAG_FIELDS, SchemaError, Support
from enginehouse.runtime.request import Constraint, ConstraintKind

MAX_VALUE_BYTES = 64 * 1024
MAX_SPACE = 1  # white space characters in a row within a tag's JSON: more is a model gone astray
_WANTED = {
    ConstraintKind.JSON_SCHEMA: "a JSON schema",
    ConstraintKind.CHOICE: "a JSON list of strings",
    ConstraintKind.STRUCTURAL_TAG: "a structural tag as JSON",
}


def refusal(constraint: Constraint, message: str) -> RequestError:
    """The error for a constraint that cannot be followed."""
    return RequestError(message, param=constraint.param, code="invalid_value")


def check(constraint: Constraint, support: Support) -> Constraint:
    """The same constraint in the words the compiler enforces; RequestError in one sentence.

    support: of the xgrammar that will follow it. JSON_OBJECT becomes a schema and CHOICE a grammar,
    so that four kinds are left to compile.
    """
    try:
        size = len(constraint.value.encode())
    except UnicodeEncodeError:
        raise refusal(constraint, "the constraint is no Unicode text; wanted UTF-8") from None
    if size > MAX_VALUE_BYTES:
        raise refusal(
            constraint, f"the constraint has {size} bytes; wanted at most {MAX_VALUE_BYTES}"
        )
    try:
        kind, value = _translate(constraint.kind, constraint.value, support)
    except SchemaError as error:
        raise refusal(constraint, str(error)) from None
    return Constraint(kind, value, constraint.param)


def _translate(kind: ConstraintKind, value: str, support: Support) -> tuple[ConstraintKind, str]:
    if kind is ConstraintKind.JSON_OBJECT:
        return ConstraintKind.JSON_SCHEMA, '{"type": "object"}'
    if kind is ConstraintKind.REGEX:
        if not value:
            raise SchemaError("the regular expression is empty; wanted at least one character")
        return kind, spell_out(value, support)
    if kind is ConstraintKind.EBNF:
        return kind, _checked_grammar(value, support)
    data = _parse(kind, value)
    if kind is ConstraintKind.CHOICE:
        if not isinstance(data, list) or not data or not all(isinstance(x, str) for x in data):
            raise SchemaError("the choice is no list of strings; wanted at least one string in it")
        return ConstraintKind.EBNF, "root ::= " + " | ".join(_dumped(text) for text in data)
    if kind is ConstraintKind.JSON_SCHEMA:
        return kind, _dumped(exact_schema(data, support))
    return kind, _dumped(_exact_tag(data, support, 0))


def _parse(kind: ConstraintKind, value: str) -> Any:
    def refuse_number(word: str) -> None:
        raise SchemaError(f"{word} is no JSON number; wanted a finite number")

    try:
        return json.loads(value, parse_constant=refuse_number, parse_float=_finite)
    except SchemaError:
        raise
    except RecursionError:
        raise SchemaError(f"it is nested more than {MAX_DEPTH} deep; make it flatter") from None
    except ValueError as error:
        raise SchemaError(f"it is no JSON ({error}); wanted {_WANTED[kind]}") from None


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) > 1.7e308:
        raise SchemaError(f"the number {text[:20]} is too large; wanted a finite number")
    return number


def _dumped(data: Any) -> str:
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SchemaError("it has half a surrogate pair; wanted Unicode text") from None
    return text


_OF_GRAMMAR = re.compile(r'"(?:\\.|[^"\\])*"|#[^\n]*|\[(?:\\.|[^\]\\])*\]', re.S)
_CODES = re.compile(r"\\[xuU]\{?([0-9A-Fa-f]+)")


def _checked_grammar(grammar: str, support: Support) -> str:
    """A grammar as it is; SchemaError for a class that this version takes for bytes."""
    for found in _OF_GRAMMAR.findall(grammar):
        beyond = not found.isascii() or any(int(code, 16) > 0x7F for code in _CODES.findall(found))
        if found[0] == "[" and beyond:
            support.require(
                "classes beyond ASCII",
                f"the class {found[:40]}, which names characters beyond ASCII,",
                'write alternatives instead, such as ("\u00e9" | "\u00fc")',
            )
    return grammar


def _exact_tag(data: Any, support: Support, depth: int, kind: str | None = None) -> Any:
    """A structural tag, or a part of it, all of it enforced. kind: its type unless it says one."""
    if depth > MAX_DEPTH:
        raise SchemaError(f"the structural tag is nested more than {MAX_DEPTH} deep")
    if isinstance(data, list):
        return [_exact_tag(item, support, depth + 1, kind) for item in data]
    if not isinstance(data, dict):
        return data
    _check_fields(data, support, kind)
    result: dict[str, Any] = {}
    for key, value in data.items():
        legacy = key == "schema" and "begin" in data
        if key == "json_schema" or legacy:
            if legacy and isinstance(value, str):
                value = _parse(ConstraintKind.JSON_SCHEMA, value)
            result[key] = exact_schema(value, support)
        elif key == "pattern" and isinstance(value, str):
            result[key] = spell_out(value, support)
        elif key == "grammar" and isinstance(value, str):
            result[key] = _checked_grammar(value, support)
        else:
            inner = "tag" if key == "tags" else None
            result[key] = _exact_tag(value, support, depth + 1, inner)
    if data.get("type") == "json_schema" and support.has("max_whitespace_cnt"):
        result.setdefault("max_whitespace_cnt", MAX_SPACE)
    return result


def _check_fields(data: dict[str, Any], support: Support, kind: str | None) -> None:
    """SchemaError for what a version would pass over that knows TAG_FIELDS only."""
    kind = data.get("type", kind)
    known = TAG_FIELDS.get(str(kind), set())
    for field in data:
        if field != "type" and field not in known:
            support.require(
                "every field of structural tags", f"the field {field[:40]!r} of {str(kind)[:40]!r}"
            )

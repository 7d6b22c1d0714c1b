"""A request's Constraint -> the text that xgrammar is given, refused early where that can be seen.

Size, nesting and keywords are looked at here, in microseconds; what only compiling can tell is
found out in a process of its own (`grammar_compiler.py`). Imports neither torch nor xgrammar.
"""

from __future__ import annotations

import json
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.json_schema import MAX_DEPTH, SchemaError, exact_schema
from enginehouse.runtime.request import Constraint, ConstraintKind

MAX_VALUE_BYTES = 64 * 1024
_WANTED = {
    ConstraintKind.JSON_SCHEMA: "a JSON schema",
    ConstraintKind.CHOICE: "a JSON list of strings",
    ConstraintKind.STRUCTURAL_TAG: "a structural tag as JSON",
}


def refusal(constraint: Constraint, message: str) -> RequestError:
    """The error for a constraint that cannot be followed."""
    return RequestError(message, param=constraint.param, code="invalid_value")


def check(constraint: Constraint) -> Constraint:
    """The same constraint in the words the compiler enforces; RequestError in one sentence.

    JSON_OBJECT becomes a schema and CHOICE a grammar, so that four kinds are left to compile.
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
        kind, value = _translate(constraint.kind, constraint.value)
    except SchemaError as error:
        raise refusal(constraint, str(error)) from None
    return Constraint(kind, value, constraint.param)


def _translate(kind: ConstraintKind, value: str) -> tuple[ConstraintKind, str]:
    if kind is ConstraintKind.JSON_OBJECT:
        return ConstraintKind.JSON_SCHEMA, '{"type": "object"}'
    if kind is ConstraintKind.REGEX:
        if not value:
            raise SchemaError("the regular expression is empty; wanted at least one character")
        return kind, lines_excluded(value)
    if kind is ConstraintKind.EBNF:
        return kind, value
    data = _parse(kind, value)
    if kind is ConstraintKind.CHOICE:
        if not isinstance(data, list) or not data or not all(isinstance(x, str) for x in data):
            raise SchemaError("the choice is no list of strings; wanted at least one string in it")
        return ConstraintKind.EBNF, "root ::= " + " | ".join(_dumped(text) for text in data)
    if kind is ConstraintKind.JSON_SCHEMA:
        return kind, _dumped(exact_schema(data))
    return kind, _dumped(_with_exact_schemas(data, 0))


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


def _with_exact_schemas(data: Any, depth: int) -> Any:
    """A structural tag whose schemas are all enforced."""
    if depth > MAX_DEPTH:
        raise SchemaError(f"the structural tag is nested more than {MAX_DEPTH} deep")
    if isinstance(data, list):
        return [_with_exact_schemas(item, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    result: dict[str, Any] = {}
    for key, value in data.items():
        legacy = key == "schema" and "begin" in data
        if key == "json_schema" or legacy:
            if legacy and isinstance(value, str):
                value = _parse(ConstraintKind.JSON_SCHEMA, value)
            result[key] = exact_schema(value)
        elif key == "pattern" and isinstance(value, str):
            result[key] = lines_excluded(value)
        else:
            result[key] = _with_exact_schemas(value, depth + 1)
    return result


def lines_excluded(pattern: str) -> str:
    """A regular expression in which a dot matches no line break, as everywhere but in xgrammar."""
    out, in_class, i = [], False, 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            out.append(pattern[i : i + 2])
            i += 2
            continue
        if char == "[":
            in_class = True
        elif char == "]":
            in_class = False
        out.append("[^\\n\\r]" if char == "." and not in_class else char)
        i += 1
    return "".join(out)

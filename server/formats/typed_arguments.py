"""Arguments that a model writes as bare text, and what JSON they are by the function's schema.

A string stands there without quotes, all else as JSON; so only the schema tells "5" from 5. This
file does not know where in a call an argument stands.
Source: JSON Schema 2020-12; how vLLM reads the arguments of Qwen3-Coder and GLM-4.5.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from enginehouse.server.tools.json_reader import to_json, value_text

_ALL = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_MOST_STEPS = 32  # from a schema to those it is made of
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema itself, where it was a reference into root; one that leads nowhere is true."""
    for _ in range(_MOST_STEPS):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            target = target.get(part) if part and isinstance(target, Mapping) else target
        schema = target
    return True


def argument_schema(name: str, schema: Mapping[str, Any]) -> Any:
    """Of the argument of that name; true where the function's schema says nothing of it."""
    found = [
        each["properties"][name]
        for each in _parts(schema, schema, ("anyOf", "oneOf", "allOf"))
        if isinstance(each.get("properties"), Mapping) and name in each["properties"]
    ]
    if len(found) > 1:
        return {"anyOf": found}
    return found[0] if found else True


def alternatives(schema: Any, root: Mapping[str, Any]) -> list[Any]:
    """What a schema is one of, by anyOf or oneOf, however deep; itself, where it is of none."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return [schema]
    parts = _parts(schema, root, ("anyOf", "oneOf"))
    return [each for each in parts if not each.get("anyOf") and not each.get("oneOf")]


def _parts(schema: Any, root: Mapping[str, Any], keys: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """The schema and all that it is combined of by these keys, each once."""
    found: dict[int, Mapping[str, Any]] = {}
    waiting = [schema]
    while waiting:
        each = resolved(waiting.pop(), root)
        if isinstance(each, Mapping) and id(each) not in found:
            found[id(each)] = each
            waiting += [part for key in keys for part in _listed(each.get(key))][::-1]
    return list(found.values())


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types of the values it may have."""
    return _kinds(schema, root, {}, 0) or _ALL


def _kinds(
    schema: Any, root: Mapping[str, Any], known: dict[int, frozenset[str]], depth: int
) -> frozenset[str]:
    """known: of schemas that were met before; of one that leads back to itself, none."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > _MOST_STEPS:
        return _ALL
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = frozenset()
    kinds = _ALL
    if "type" in schema:
        kinds &= {str(each) for each in _listed(schema["type"]) or [schema["type"]]}
    elif "properties" in schema:
        kinds &= {"object"}
    elif "items" in schema:
        kinds &= {"array"}
    values = _listed(schema.get("enum")) + ([schema["const"]] if "const" in schema else [])
    if values:
        kinds &= set().union(*(_kinds_of_value(value) for value in values))
    for key in ("anyOf", "oneOf"):
        if parts := _listed(schema.get(key)):
            kinds &= set().union(*(_kinds(part, root, known, depth + 1) for part in parts))
    for part in _listed(schema.get("allOf")):
        kinds &= _kinds(part, root, known, depth + 1)
    known[id(schema)] = kinds
    return kinds


def json_of(text: str, schema: Any, root: Mapping[str, Any]) -> str:
    """The JSON text of an argument. What is of no type that the schema allows is a string."""
    kinds = kinds_of(schema, root)
    if kinds == {"string"}:
        return to_json(text)
    found = value_text(text) or _of_python(text)
    if found is None:
        return to_json(text)
    taken = _kinds_of_value(json.loads(found))
    if "string" in taken and "string" in kinds:
        return to_json(text)  # its quotes are its own
    return found if taken & kinds or "string" not in kinds else to_json(text)


def bare_text(value: Any) -> str:
    """An argument as a model writes it."""
    return value if isinstance(value, str) else to_json(value)


def _of_python(text: str) -> str | None:
    """Templates that write values as Python does teach models to do so too."""
    text = text.strip()
    if text in _PYTHON_NAMES:
        return _PYTHON_NAMES[text]
    if text[:1] not in ("{", "["):
        return None
    try:
        return value_text(to_json(ast.literal_eval(text)))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _kinds_of_value(value: Any) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case None:
            return {"null"}
        case list():
            return {"array"}
    return {"object"}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []

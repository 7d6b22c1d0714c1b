"""One node of a schema: its keywords in the words of draft 2020-12, and two nodes made one.

What is no assertion is left out: unknown keywords are annotations. Knows no reference.
Source: JSON Schema core 2020-12, section 6.5; the drafts' "migrating" pages (json-schema.org).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas.values import key_of

Node = dict[str, Any]

ANY = "anyOf of"  # in a merged node: the lists of anyOf and oneOf that must all hold
PATTERNS, FORMATS = "patterns", "formats"  # in a merged node: all that must hold
NOT = "none of"

MOST = 2**53  # of numbers, and of what the compiler's own arithmetic is exact for

_MOST = {"minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"}
_LEAST = {"maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"}
_KNOWN = {
    *("type", "enum", "const", "$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf"),
    *("not", "if", "then", "else", "pattern", "format", "multipleOf"),
    *("items", "prefixItems", "unevaluatedItems", "additionalItems", "uniqueItems"),
    *("contains", "minContains", "maxContains", "properties", "required", "patternProperties"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas"),
    *_MOST,
    *_LEAST,
}
_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("properties", "patternProperties", "dependentRequired", "dependentSchemas"),
        (dict, "a JSON object"),
    ),
    "required": (list, "a list of strings"),
    "prefixItems": (list, "a list of schemas"),
    "allOf": (list, "a list of schemas"),
    "enum": (list, "a list of at least one value"),
}
LISTED = ("if", "contains", "dependentRequired", "dependentSchemas", "$dynamicRef")

_OF_STRINGS = {PATTERNS, FORMATS, "minLength", "maxLength"}
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_OF_ARRAYS = {
    *("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems"),
    "contains",
}
_OF_OBJECTS = {
    *("properties", "required", "patternProperties", "additionalProperties", "propertyNames"),
    *("unevaluatedProperties", "minProperties", "maxProperties"),
    *("dependentRequired", "dependentSchemas"),
}


class Nothing(SchemaError):
    """No value satisfies the schema."""


def node_of(schema: Node, path: str) -> Node:
    """The assertions of one schema, none of its children touched."""
    node = {key: value for key, value in schema.items() if key in _KNOWN}
    for bound, beside in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(node.get(bound), bool) and (beside in node or not node[bound]):  # draft 4
            if node.pop(bound):
                node[bound] = node.pop(beside)
    rest = node.pop("additionalItems", None)
    if isinstance(node.get("items"), list):  # before 2020-12
        node["prefixItems"] = node.pop("items")
        if rest is not None:
            node["items"] = rest
    for name, value in _object(node.pop("dependencies", {}), f"{path}.dependencies").items():
        kind = "dependentRequired" if isinstance(value, list) else "dependentSchemas"
        node[kind] = {**node.get(kind, {}), name: value}
    if "$recursiveRef" in node:
        node["$dynamicRef"] = node.pop("$recursiveRef")
    _check_shapes(node, path)
    groups = []
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            groups.append((keyword, _schemas(node.pop(keyword), f"{path}.{keyword}"), path))
    if groups:
        node[ANY] = groups
    for keyword, plural in (("pattern", PATTERNS), ("format", FORMATS), ("not", NOT)):
        if keyword in node:
            node[plural] = [node.pop(keyword)]
    if "const" in node:
        node = merged({"enum": [node.pop("const")]}, node, path)
    if not node.get("enum", True):
        raise SchemaError(f"{path}.enum is an empty list; wanted a list of at least one value")
    if "type" in node and isinstance(node["type"], str):
        node["type"] = [node["type"]]
    if "if" in node:
        condition = {"if": node.pop("if")}
        condition |= {key: node.pop(key) for key in ("then", "else") if key in node}
        if len(condition) > 1:
            node["if"] = [condition]
    node = {key: value for key, value in node.items() if key not in ("then", "else")}
    if not node.get("uniqueItems", True):
        del node["uniqueItems"]
    if "contains" in node:
        least = node.pop("minContains", 1)
        contains = {"contains": node.pop("contains"), "minContains": least}
        if least or "maxContains" in node:
            node["contains"] = [contains]
    for key in ("minContains", "maxContains"):
        node.pop(key, None)
    return node


def _check_shapes(node: Node, path: str) -> None:
    for keyword, (shape, wanted) in _SHAPES.items():
        if not isinstance(node.get(keyword, shape()), shape):
            raise SchemaError(f"{path}.{keyword} is {str(node[keyword])[:40]!r}; wanted {wanted}")
    if not all(isinstance(name, str) for name in node.get("required", [])):
        raise SchemaError(f"{path}.required is no list of names; wanted a list of strings")
    for keyword in (_MOST | _LEAST) & node.keys():
        value = node[keyword]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SchemaError(f"{path}.{keyword} is {str(value)[:40]!r}; wanted a number")


def merged(first: Node, second: Node, path: str) -> Node:
    """What satisfies both. Children of both become an allOf of the two, to be merged in turn."""
    result = dict(first)
    _apart(result, second := dict(second))
    for key, value in second.items():
        if key not in result:
            result[key] = value
        elif key in _MOST | _LEAST:
            result[key] = (max if key in _MOST else min)(result[key], value)
        elif key in _JOIN:
            result[key] = _JOIN[key](result[key], value)
        elif result[key] != value:
            result[key] = [*_as_list(result[key]), *_as_list(value)]
    if not result.get("type", True):
        raise Nothing(f"{path} wants two different types; nothing satisfies it")
    if not result.get("enum", True):
        raise Nothing(f"{path} has enums that share no value; nothing satisfies it")
    return result


def both(first: Any, second: Any) -> Any:
    """A schema of what satisfies the two."""
    for one, other in ((first, second), (second, first)):
        if one is True or one == {} or one == other:
            return other
        if one is False:
            return False
    return {"allOf": [first, second]}


def as_schema(node: Node) -> Node:
    """A merged node in a schema's own words, for a validator."""
    schema = {key: value for key, value in node.items() if key not in _MERGED_WORDS}
    for key in ("multipleOf", *LISTED):
        if isinstance(schema.get(key), list):
            del schema[key]
    parts: list[Any] = [{keyword: branches} for keyword, branches, _ in node.get(ANY, [])]
    for plural, keyword in ((PATTERNS, "pattern"), (NOT, "not")):
        parts += [{keyword: value} for value in node.get(plural, [])]
    parts += list(_listed(node))
    return {**schema, "allOf": parts} if parts else schema


_MERGED_WORDS = {ANY, PATTERNS, FORMATS, NOT}


def _listed(node: Node) -> Iterator[Node]:
    yield from (*node.get("if", []), *node.get("contains", []))
    for multiple in node["multipleOf"] if isinstance(node.get("multipleOf"), list) else []:
        yield {"multipleOf": multiple}


def words_of(kind: str) -> set[str]:
    return {
        "string": _OF_STRINGS,
        "number": _OF_NUMBERS,
        "integer": _OF_NUMBERS,
        "array": _OF_ARRAYS,
        "object": _OF_OBJECTS,
    }.get(kind, set())


def _apart(first: Node, second: Node) -> None:
    """Give each the properties and items of which only the other speaks, by what its rest says."""
    for one, other in ((first, second), (second, first)):
        rest = one.get("additionalProperties", True)
        if rest is True or rest == {} or one.get("patternProperties"):
            continue
        own = one.get("properties", {})
        extra = {name: rest for name in other.get("properties", {}) if name not in own}
        if extra:
            one["properties"] = {**own, **extra}
    longest = max(len(node.get("prefixItems", [])) for node in (first, second))
    for one in (first, second):
        prefix = one.get("prefixItems", [])
        if longest and "items" in one:
            one["prefixItems"] = [*prefix, *[one["items"]] * (longest - len(prefix))]


def _join_types(first: Any, second: Any) -> list[str]:
    kept = [kind for kind in _as_list(first) if kind in _as_list(second)]
    for one, other in ((first, second), (second, first)):
        if "integer" in _as_list(one) and "number" in _as_list(other) and "integer" not in kept:
            kept.append("integer")
    return kept


def _join_enums(first: list[Any], second: list[Any]) -> list[Any]:
    shared = set(map(key_of, second))
    return [value for value in first if key_of(value) in shared]


def _join_named(first: Node, second: Node) -> Node:
    return {
        **first,
        **{name: both(first[name], s) if name in first else s for name, s in second.items()},
    }


def _join_multiples(first: Any, second: Any) -> Any:
    if type(first) is int and type(second) is int and first > 0 and second > 0:
        both_of = math.lcm(first, second)
        if both_of <= MOST:
            return both_of
    return first if first == second else [*_as_list(first), *_as_list(second)]


def _join_prefixes(first: list[Any], second: list[Any]) -> list[Any]:
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    return [*map(both, longer, shorter), *longer[len(shorter) :]]


_JOIN: dict[str, Callable[[Any, Any], Any]] = {
    "type": _join_types,
    "enum": _join_enums,
    "properties": _join_named,
    "patternProperties": _join_named,
    "required": lambda first, second: list(dict.fromkeys([*first, *second])),
    "multipleOf": _join_multiples,
    "prefixItems": _join_prefixes,
    "uniqueItems": lambda first, second: first or second,
    **dict.fromkeys(
        ("items", "unevaluatedItems", "additionalProperties", "unevaluatedProperties"), both
    ),
    "propertyNames": both,
    **dict.fromkeys((ANY, PATTERNS, FORMATS, NOT), lambda first, second: [*first, *second]),
}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _object(value: Any, where: str) -> Node:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} is no object; wanted a JSON object")
    return value


def _schemas(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SchemaError(f"{where} is no list of schemas; wanted at least one schema in it")
    return value

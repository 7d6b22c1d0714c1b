"""JSON schema -> the same schema in words that the grammar compiler enforces exactly.

xgrammar compiles a schema to a grammar and passes over what it does not know. Here everything is
known: a keyword is enforced, or changes nothing by its definition, or refused with its path.
What is generated always validates; it may be less than all that would (see docs/constraints.md).
Source: JSON Schema 2020-12, core and validation; xgrammar's json_schema_converter.
"""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

from enginehouse.runtime.grammar.json_scalars import (
    exact_integer,
    exact_number,
    exact_pattern,
    exact_string,
)
from enginehouse.runtime.grammar.support import NEWEST, SchemaError, Support

MAX_DEPTH = 64
MAX_REPEAT = 10_000  # of minLength, maxItems and the like: each is that many states
MAX_LENGTH = 2**31 - 1  # of maxLength, which is counted
MAX_NODES = 20_000  # each target of a $ref counted again: the engine waits for this walk

_ANNOTATIONS = {
    *("title", "description", "default", "example", "examples", "deprecated", "readOnly"),
    *("writeOnly", "$schema", "$id", "$comment", "$defs", "definitions", "discriminator"),
    *("contentEncoding", "contentMediaType", "x-order"),
}
_OF_TYPE = {
    "string": {"pattern", "format", "minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"},
    "object": {
        *("properties", "required", "additionalProperties", "unevaluatedProperties"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties"),
    },
    "boolean": set(),
    "null": set(),
}
_SCALARS = {"string": exact_string, "integer": exact_integer, "number": exact_number}
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "boolean": (bool,),
    "null": (type(None),),
}


def exact_schema(schema: Any, support: Support = NEWEST) -> dict[str, Any]:
    """A new schema, all of whose keywords are enforced; SchemaError names what cannot be."""
    return _Walk(schema, support).run()


def check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise SchemaError(f"the schema is nested more than {MAX_DEPTH} deep; make it flatter")


def check_num_nodes(count: int) -> None:
    if count > MAX_NODES:
        raise SchemaError(
            f"the schema and what its references point to have more than {MAX_NODES} parts; "
            "make it smaller"
        )


class _Walk:
    def __init__(self, root: Any, support: Support) -> None:
        self.root = root
        self.support = support
        self.names: dict[str, str] = {}  # where a $ref points -> its name in defs
        self.defs: dict[str, dict[str, Any]] = {}
        self.pending: deque[tuple[str, str, Any]] = deque()  # name, path, schema of a $ref
        self.one_ofs: list[dict[str, Any]] = []
        self.num_nodes = 0

    def run(self) -> dict[str, Any]:
        result = self.schema(self.root, "schema", 0)
        while self.pending:
            name, path, target = self.pending.popleft()
            self.defs[name] = self.schema(target, path, 0)
        for node in self.one_ofs:
            if not self._disjoint(node["oneOf"]):  # xgrammar must prove it, or refuses
                self.support.require(
                    "oneOf of branches that may overlap",
                    "a oneOf whose branches are no different types, nor different strings of one "
                    "required property,",
                    "write anyOf",
                )
                continue
            node["anyOf"] = node.pop("oneOf")
        return {**result, "$defs": self.defs} if self.defs else result

    def schema(self, schema: Any, path: str, depth: int) -> dict[str, Any]:
        check_depth(depth)
        self.num_nodes += 1
        check_num_nodes(self.num_nodes)
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            found = "false, which nothing satisfies" if schema is False else repr(schema)[:40]
            raise SchemaError(f"{path} is {found}; wanted a JSON schema object")
        node = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        for keyword in _ALONE:
            if keyword in node:
                return self._alone(keyword, node, path, depth)
        return self._typed(node, path, depth)

    def _alone(self, keyword: str, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        value, where = node.pop(keyword), f"{path}.{keyword}"
        if keyword in ("const", "enum"):
            return self._values(keyword, value, node, where)
        if keyword == "anyOf" and set(node) == {"type"}:
            value = _with_type(value, node.pop("type"), where)
        for other in node:
            raise SchemaError(
                f"{path}.{other} beside {keyword} is not supported; move it into the branches"
            )
        if keyword == "$ref":
            return {"$ref": self._reference(value, where)}
        if not isinstance(value, list) or not value:
            raise SchemaError(f"{where} is no list of schemas; wanted at least one schema in it")
        if keyword == "allOf" and len(value) > 1:
            raise SchemaError(
                f"{where} with more than one schema is not supported; merge them into one"
            )
        branches = [self.schema(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        if len(branches) == 1:
            return branches[0]
        made = {keyword: branches}
        if keyword == "oneOf":
            self.one_ofs.append(made)
        return made

    def _values(self, keyword: str, value: Any, node: dict[str, Any], where: str) -> dict[str, Any]:
        """const or enum, perhaps beside a type: the values of that type."""
        values = [value] if keyword == "const" else value
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{where} is no list; wanted a list of at least one value")
        wanted = node.pop("type", None)
        for other in node:
            raise SchemaError(f"{other} beside {where} is not supported; leave it out")
        if wanted is not None:
            kinds = _types(wanted, where)
            values = [v for v in values if any(_is_of_type(v, kind) for kind in kinds)]
            if not values:
                raise SchemaError(f"{where} has no value of type {wanted!r}; nothing satisfies it")
        for item in values:
            _check_numbers(item, where)
        return {"enum": values}

    def _reference(self, value: Any, where: str) -> str:
        """The name of a translated copy of what a $ref points to."""
        if value == "#":
            return "#"
        if not isinstance(value, str) or not value.startswith("#/") or re.search("[~%]", value):
            raise SchemaError(
                f"{where} is {str(value)[:60]!r}; wanted a reference into the schema itself, "
                "such as '#/$defs/name'"
            )
        target: Any = self.root
        for part in value[2:].split("/"):
            if not isinstance(target, dict) or part not in target:
                raise SchemaError(f"{where} points to {value[:60]!r}, which is not in the schema")
            target = target[part]
        if value not in self.names:
            name = self.names[value] = f"ref{len(self.names)}"
            self.pending.append((name, value, target))
        return f"#/$defs/{self.names[value]}"

    def _disjoint(self, branches: list[dict[str, Any]]) -> bool:
        """Whether no value satisfies two branches: other types, or other values of one key."""
        resolved = [self._resolve(branch) for branch in branches]
        kinds = [branch.get("type") for branch in resolved]
        families = ["number" if kind == "integer" else kind for kind in kinds]
        if all(isinstance(kind, str) for kind in families) and len(set(families)) == len(kinds):
            return True
        if any(kind != "object" for kind in kinds):
            return False
        shared = set.intersection(*(set(branch.get("required", [])) for branch in resolved))
        return any(_values_differ([b["properties"][key] for b in resolved]) for key in shared)

    def _resolve(self, branch: dict[str, Any]) -> dict[str, Any]:
        for _ in range(MAX_DEPTH):
            name = branch.get("$ref", "").removeprefix("#/$defs/")
            if name not in self.defs:
                return branch
            branch = self.defs[name]
        return branch

    def _typed(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """A schema of one type or several, each with its own keywords."""
        if "type" in node:
            kinds = _types(node["type"], f"{path}.type")
        else:
            kinds = [kind for kind in ("object", "array") if _OF_TYPE[kind] & node.keys()]
            if not kinds and node:
                raise SchemaError(_unsupported(path, next(iter(node)), "without a type"))
        known = {"type"}.union(*(_OF_TYPE[kind] for kind in kinds))
        for keyword in node:
            if keyword not in known:
                beside = f"for type {'/'.join(kinds)}" if kinds else "here"
                raise SchemaError(_unsupported(path, keyword, beside))
        if not kinds:
            return {}
        made = []
        for kind in kinds:
            part = {key: value for key, value in node.items() if key in _OF_TYPE[kind]}
            _check_counts(part, path)
            if kind in _SCALARS:
                made.append(_SCALARS[kind](part, path, self.support))
            elif kind == "array":
                made.append({"type": kind, **self._array(part, path, depth)})
            elif kind == "object":
                made.append({"type": kind, **self._object(part, path, depth)})
            else:
                made.append({"type": kind})
        return made[0] if len(made) == 1 else {"anyOf": made}

    def _array(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        if "items" in node and "unevaluatedItems" in node:
            del node["unevaluatedItems"]  # nothing is left for it
        for keyword in ("items", "unevaluatedItems"):
            if node.get(keyword, False) is not False:
                node[keyword] = self.schema(node[keyword], f"{path}.{keyword}", depth + 1)
        if "prefixItems" in node:
            where, items = f"{path}.prefixItems", node["prefixItems"]
            if not isinstance(items, list):
                raise SchemaError(f"{where} is no list; wanted a list of schemas")
            node["prefixItems"] = [
                self.schema(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(items)
            ]
        return node

    def _object(self, node: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        properties = self._named_schemas(node, "properties", path, depth)
        patterns = self._named_schemas(node, "patternProperties", path, depth)
        if "additionalProperties" in node:
            node.pop("unevaluatedProperties", None)
        rest_key = "additionalProperties" if "additionalProperties" in node else ""
        rest_key = rest_key or ("unevaluatedProperties" if "unevaluatedProperties" in node else "")
        rest = node.pop(rest_key, None) if rest_key else None
        if isinstance(rest, dict):
            rest = self.schema(rest, f"{path}.{rest_key}", depth + 1)
        elif rest not in (None, True, False):
            raise SchemaError(f"{path}.{rest_key} is {str(rest)[:40]!r}; wanted a schema")
        closed = rest is False or (rest is None and bool(properties or patterns))
        self._require(node, properties, rest, path)
        result: dict[str, Any] = {**node, "additionalProperties": False if closed else rest or True}
        if properties:
            self._check_names(properties, path)
            result["properties"] = properties
        if patterns:
            self._check_patterns(patterns, properties, closed, node, path)
            where = f"{path}.patternProperties"
            result["patternProperties"] = {
                exact_pattern(pattern, where, self.support): s for pattern, s in patterns.items()
            }
        if "propertyNames" in node:
            if properties or patterns:
                raise SchemaError(_unsupported(path, "propertyNames", "beside named properties"))
            if closed:
                raise SchemaError(_unsupported(path, "propertyNames", "where no name is allowed"))
            if isinstance(rest, dict):
                self.support.require(
                    "propertyNames beside additionalProperties",
                    f"{path}.propertyNames beside a schema of other properties",
                )
            names = {"type": "string", **_as_dict(node["propertyNames"], f"{path}.propertyNames")}
            result["propertyNames"] = self.schema(names, f"{path}.propertyNames", depth + 1)
        if node.get("minProperties", 0) > max(1, len(node.get("required", []))) and (
            not closed or patterns
        ):
            raise SchemaError(_unsupported(path, "minProperties", "where keys may be repeated"))
        return result

    def _named_schemas(
        self, node: dict[str, Any], keyword: str, path: str, depth: int
    ) -> dict[str, Any]:
        where = f"{path}.{keyword}"
        found = _as_dict(node.pop(keyword, {}), where)
        return {name: self.schema(s, f"{where}.{name}", depth + 1) for name, s in found.items()}

    def _require(
        self, node: dict[str, Any], properties: dict[str, Any], rest: Any, path: str
    ) -> None:
        """A required name that has no schema of its own gets the one of all other names."""
        required = node.get("required", [])
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise SchemaError(f"{path}.required is no list of names; wanted a list of strings")
        for name in required:
            if name not in properties and rest is False:
                raise SchemaError(
                    f"{path}.required names {name[:40]!r}, which additionalProperties forbids; "
                    "add it to properties"
                )
            properties.setdefault(name, rest if isinstance(rest, dict) else {})

    def _check_names(self, properties: dict[str, Any], path: str) -> None:
        for name in properties:
            if "\\" in json.dumps(name, ensure_ascii=False):
                self.support.require(
                    "names with escapes",
                    f"{path}.properties: the name {name[:40]!r}, which JSON writes with an escape,",
                    "rename it",
                )

    def _check_patterns(
        self,
        patterns: dict[str, Any],
        properties: dict[str, Any],
        closed: bool,
        node: dict[str, Any],
        path: str,
    ) -> None:
        if len(patterns) > 1 or not closed:
            raise SchemaError(
                f"{path}.patternProperties is supported with one pattern and "
                "additionalProperties: false only"
            )
        if properties:
            raise SchemaError(_unsupported(path, "patternProperties", "beside named properties"))


def _unsupported(path: str, keyword: str, where: str) -> str:
    return f"{path}: the keyword {keyword[:60]!r} is not supported {where}; leave it out"


def _as_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} is no object; wanted a JSON object")
    return value


def _types(value: Any, where: str) -> list[str]:
    kinds = value if isinstance(value, list) else [value]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _OF_TYPE:
            raise SchemaError(
                f"{where} is {str(kind)[:40]!r}; wanted {', '.join(_OF_TYPE)}, or a list of them"
            )
    if not kinds:
        raise SchemaError(f"{where} is an empty list; wanted at least one type")
    if "number" in kinds:
        kinds = [kind for kind in kinds if kind != "integer"]
    return list(dict.fromkeys(kinds))


def _is_of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES[kind])


def _with_type(branches: Any, kind: Any, where: str) -> Any:
    """anyOf beside a type: each branch gets that type."""
    if not isinstance(branches, list) or not all(isinstance(b, dict) for b in branches):
        raise SchemaError(f"{where} is no list of schema objects; wanted a list of them")
    for i, branch in enumerate(branches):
        if branch.get("type", kind) != kind or any(key in branch for key in _ALONE):
            raise SchemaError(f"{where}[{i}] and the type beside {where} differ; leave that out")
    return [{**branch, "type": kind} for branch in branches]


def _values_differ(schemas: list[dict[str, Any]]) -> bool:
    """Whether the schemas are lists of strings of which no two share one."""
    values = [schema.get("enum", [None]) for schema in schemas]
    every = [value for group in values for value in group]
    return all(isinstance(v, str) for v in every) and len(set(every)) == len(every)


def _check_counts(node: dict[str, Any], path: str) -> None:
    for keyword in _COUNTS & node.keys():
        value = node[keyword]
        most = MAX_LENGTH if keyword == "maxLength" else MAX_REPEAT
        if type(value) is not int or not 0 <= value <= most:
            raise SchemaError(
                f"{path}.{keyword} is {str(value)[:40]}; wanted a number from 0 to {most}"
            )


def _check_numbers(value: Any, where: str) -> None:
    """Numbers that survive being written down again."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item, where)
    elif isinstance(value, int | float) and abs(value) > 2**53:
        raise SchemaError(f"{where} has a number beyond 2**53; wanted a smaller one")

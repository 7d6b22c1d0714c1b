"""JSON schema of any draft -> one that `grammar/json_schema.py` takes, and what it leaves out.

Conjunctions are merged (`merged.py`), alternatives distributed, references followed; what no value
satisfies is left out where it may be. What cannot be enforced is named, or refused when strict.
What the result lets through satisfies the rest of the schema; it may be less than all that would.
Source: JSON Schema 2020-12, core and validation.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from enginehouse.runtime.grammar.json_schema import (
    MAX_DEPTH,
    MAX_REPEAT,
    check_depth,
    check_num_nodes,
)
from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas.disjoint import disjoint
from enginehouse.runtime.schemas.effort import TooMuch, check_effort, limited
from enginehouse.runtime.schemas.judge import judge_of
from enginehouse.runtime.schemas.merged import (
    ANY,
    LISTED,
    NOT,
    Node,
    Nothing,
    as_schema,
    both,
    merged,
    node_of,
    words_of,
)
from enginehouse.runtime.schemas.numbers import plain_number
from enginehouse.runtime.schemas.references import References, Remote
from enginehouse.runtime.schemas.strings import plain_string

_KINDS = ("string", "number", "integer", "boolean", "null", "array", "object")
_JUDGED_S = 1.0  # that patterns may take to tell which values of an enum they take
_MOST_BRANCHES = 256  # that alternatives beside alternatives are multiplied to


class Plain(NamedTuple):
    """schema: what is enforced. left_out: the places of what is not."""

    schema: Node
    left_out: tuple[str, ...]


def plain_schema(schema: Any, strict: bool = True) -> Plain:
    """SchemaError for what is no schema, nothing satisfies or takes too long; when strict, for what
    is left out.
    """
    walk = _Walk(schema, strict)
    with limited():
        return Plain(walk.run(), tuple(dict.fromkeys(walk.left_out)))


class _Walk:
    def __init__(self, root: Any, strict: bool) -> None:
        self.root = root
        self.strict = strict
        self.left_out: list[str] = []
        self.references = References(root)
        self.names: dict[int, str] = {}  # id of a target -> its name in defs
        self.pending: deque[tuple[str, str, Any]] = deque()
        self.defs: dict[str, Any] = {}
        self.one_ofs: list[tuple[Node, str]] = []
        self.num_nodes = 0

    def run(self) -> Node:
        result = self.schema(self.root, "schema", 0)
        while self.pending:
            name, path, target = self.pending.popleft()
            try:
                self.defs[name] = self.schema(target, path, 0)
            except Nothing as error:
                raise SchemaError(str(error)) from None
        for node, path in self.one_ofs:
            if disjoint(node["oneOf"], self.defs):
                node["anyOf"] = node.pop("oneOf")
            elif not self.strict:  # else xgrammar must prove it, or refuses
                self.leave_out(f"{path}.oneOf", "")
                node["anyOf"] = node.pop("oneOf")
        return {**result, "$defs": self.defs} if self.defs else result

    def leave_out(self, path: str, why: str) -> None:
        if self.strict:
            raise SchemaError(f"{path} {why}")
        self.left_out.append(path)

    def schema(self, schema: Any, path: str, depth: int) -> Node:
        check_depth(depth)
        if schema is True:
            return {}
        return self.finished(self.flat(schema, path), path, depth)

    def flat(
        self, schema: Any, path: str, follow: bool = False, seen: tuple[int, ...] = ()
    ) -> Node:
        """One node without $ref and allOf, or a $ref alone. follow: that one too."""
        self.num_nodes += 1
        check_num_nodes(self.num_nodes)
        check_effort()
        if schema is True:
            return {}
        if schema is False:
            raise Nothing(f"{path} is false, which nothing satisfies")
        if not isinstance(schema, dict):
            raise SchemaError(f"{path} is {repr(schema)[:40]}; wanted a JSON schema object")
        node = node_of(schema, path)
        if any(each is True or each == {} for each in node.get(NOT, [])):
            raise Nothing(f"{path}.not forbids everything; nothing satisfies it")
        reference, parts = node.pop("$ref", None), node.pop("allOf", [])
        if not isinstance(parts, list) or ("allOf" in schema and not parts):
            raise SchemaError(
                f"{path}.allOf is no list of schemas; wanted at least one schema in it"
            )
        if reference is not None and not node and not parts and not follow:
            return {"$ref": reference}
        if reference is None and not node and len(parts) == 1:
            return self.flat(parts[0], f"{path}.allOf[0]", follow, seen)
        if reference is not None:
            where = f"{path}.$ref"
            try:
                target = self.references.target(reference, where)
            except Remote as error:
                self.leave_out(where, str(error).removeprefix(f"{where} "))
                target = True
            if id(target) in seen:
                raise SchemaError(f"{where} leads back to itself; nothing is said by it")
            node = merged(node, self.flat(target, path, True, (*seen, id(target))), path)
        for index, part in enumerate(parts):
            node = merged(node, self.flat(part, f"{path}.allOf[{index}]", True, seen), path)
        return node

    def finished(self, node: Node, path: str, depth: int) -> Node:
        """A flat node in plain words, its children walked."""
        if set(node) == {"$ref"}:
            return {"$ref": self.reference(node["$ref"], f"{path}.$ref")}
        groups = node.pop(ANY, [])
        if "enum" in node:
            return self.values({**node, ANY: groups} if groups else node, path)
        if not groups:
            return self.typed(node, path, depth)
        (keyword, branches, origin), *others = groups
        where = f"{origin}.{keyword}"
        if others:
            node = {**node, ANY: others}
        if len(branches) > _MOST_BRANCHES or depth > MAX_DEPTH:
            if node:
                raise SchemaError(
                    f"{where} has too many branches beside the rest; say less at once"
                )
        made = []
        for index, branch in enumerate(branches):
            at = f"{where}[{index}]"
            try:
                flat = self.flat(branch, at, bool(node))
                made.append(self.finished(merged(node, flat, at) if node else flat, at, depth + 1))
            except Nothing:
                continue
        if not made:
            raise Nothing(f"{where} has no branch that anything satisfies")
        if len(made) == 1:
            return made[0]
        result = {keyword: made}
        if keyword == "oneOf":
            self.one_ofs.append((result, origin))
        return result

    def reference(self, value: Any, where: str) -> str:
        if value == "#":
            return "#"
        try:
            target = self.references.target(value, where)
        except Remote as error:
            self.leave_out(where, str(error).removeprefix(f"{where} "))
            target = True
        if id(target) not in self.names:
            name = self.names[id(target)] = f"ref{len(self.names)}"
            self.pending.append((name, str(value), target))
        return f"#/$defs/{self.names[id(target)]}"

    def values(self, node: Node, path: str) -> Node:
        """Of enum or const, those values that the rest of the node takes."""
        values = node.pop("enum")
        rest = as_schema(node)
        if rest:
            root = self.root if isinstance(self.root, dict) else {}
            try:
                checker = judge_of(root, _JUDGED_S).evolve(schema=rest)
                values = [value for value in values if _is_valid(checker, value)]
            except TooMuch:
                raise
            # jsonschema's own, and what a pattern or a draft makes of it
            except Exception as error:
                self.leave_out(
                    f"{path}.enum", f"stands beside what cannot be judged ({error})"[:200]
                )
        if not values:
            raise Nothing(f"{path} has no value that the rest of it takes; nothing satisfies it")
        return {"enum": values}

    def typed(self, node: Node, path: str, depth: int) -> Node:
        kinds = self.kinds(node, path)
        for item in node.pop(NOT, []):
            kinds = self.without(kinds, item, path)
        for keyword in LISTED:
            if keyword in node and not (keyword == "contains" and "array" not in kinds):
                self.leave_out(f"{path}.{keyword}", "cannot be enforced; leave it out")
                del node[keyword]
        if kinds == list(_KINDS):
            if not node:
                return {}
            kinds = [k for k in kinds if k != "integer" and node.keys() & words_of(k)]
            if not {"object", "array"} & {*kinds} and self.strict:
                name = next(iter(node)).removesuffix("s")
                raise SchemaError(f"{path}: the keyword {name!r} stands without a type; add one")
        made = []
        for kind in kinds:
            part = {key: value for key, value in node.items() if key in words_of(kind)}
            try:
                made.append(self.of_kind(kind, part, path, depth))
            except Nothing:
                if len(kinds) == 1:
                    raise
        if not made:
            raise Nothing(f"{path} is of no type that anything satisfies")
        return made[0] if len(made) == 1 else {"anyOf": made}

    def kinds(self, node: Node, path: str) -> list[str]:
        if "type" not in node:
            return list(_KINDS)
        kinds = node.pop("type")
        if not isinstance(kinds, list) or not kinds:
            raise SchemaError(f"{path}.type is {str(kinds)[:40]!r}; wanted {', '.join(_KINDS)}")
        for kind in kinds:
            if not isinstance(kind, str) or kind not in _KINDS:
                raise SchemaError(
                    f"{path}.type is {str(kind)[:40]!r}; wanted {', '.join(_KINDS)}, "
                    "or a list of them"
                )
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return list(dict.fromkeys(kinds))

    def without(self, kinds: list[str], item: Any, path: str) -> list[str]:
        """The types that a `not` leaves; one of more than types is left out."""
        if item is False:
            return kinds
        forbidden = item.get("type") if isinstance(item, dict) and set(item) == {"type"} else None
        names = [forbidden] if isinstance(forbidden, str) else forbidden
        names = names if isinstance(names, list) else []
        if not names or ("integer" in names and "number" in kinds):
            self.leave_out(f"{path}.not", "cannot be enforced; leave it out")
            return kinds
        kept = [kind for kind in kinds if kind not in names]
        if "number" in names:
            kept = [kind for kind in kept if kind != "integer"]
        if not kept:
            raise Nothing(f"{path}.not leaves no type; nothing satisfies it")
        return kept

    def of_kind(self, kind: str, part: Node, path: str, depth: int) -> Node:
        if kind == "string":
            return plain_string(part, path, self.leave_out)
        if kind in ("number", "integer"):
            return plain_number(kind, part, path, self.leave_out)
        if kind == "array":
            return {"type": kind, **self.array(part, path, depth)}
        if kind == "object":
            return {"type": kind, **self.object(part, path, depth)}
        return {"type": kind}

    def array(self, node: Node, path: str, depth: int) -> Node:
        if node.pop("uniqueItems", False) and node.get("maxItems", 2) > 1:
            self.leave_out(f"{path}.uniqueItems", "cannot be enforced; leave it out")
        if node.get("maxItems", 0) > MAX_REPEAT:
            node["maxItems"] = MAX_REPEAT
        prefix = []
        for index, item in enumerate(node.pop("prefixItems", [])):
            try:
                prefix.append(self.schema(item, f"{path}.prefixItems[{index}]", depth + 1))
            except Nothing:
                node = {**node, "items": False}
                break
        rest = node.pop("unevaluatedItems", None)
        node.setdefault("items", rest) if rest is not None else None
        if "items" in node:
            try:
                if node["items"] is not True:
                    node["items"] = self.schema(node["items"], f"{path}.items", depth + 1)
                else:
                    del node["items"]
            except Nothing:
                node["items"] = False
                most = min(node.get("maxItems", len(prefix)), len(prefix))
                if not prefix:
                    node = {**node, "items": {"type": "null"}, "maxItems": most}
                elif node.get("maxItems", most) < most:
                    prefix = prefix[:most]
                if node.get("minItems", 0) > most:
                    raise Nothing(f"{path}.minItems is more than there can be") from None
        return {**node, "prefixItems": prefix} if prefix else node

    def object(self, node: Node, path: str, depth: int) -> Node:
        properties = dict(node.pop("properties", {}))
        patterns = dict(node.pop("patternProperties", {}))
        rest = node.pop("unevaluatedProperties", None)
        rest = node.pop("additionalProperties", rest)
        required = node.get("required", [])
        names = node.pop("propertyNames", True)
        if names is not True and names != {}:
            finite = self.finite_names(names, path)
            if finite is not None:
                every = True if rest is None else rest
                properties = {name: properties.get(name, every) for name in finite}
                rest, patterns = False, {}
            elif properties:
                self.leave_out(
                    f"{path}.propertyNames", "stands beside named properties; leave it out"
                )
            else:
                where = f"{path}.propertyNames"
                made_of = self.schema(both({"type": "string"}, names), where, depth + 1)
                if made_of.get("type") == "string":
                    node["propertyNames"] = made_of
                else:
                    self.leave_out(where, "is of several kinds of names; say it by one pattern")
        if patterns and properties:
            self.leave_out(
                f"{path}.patternProperties", "stands beside named properties; leave it out"
            )
            patterns = {}
        made: Node = {}
        for name, schema in properties.items():
            try:
                made[name] = self.schema(schema, f"{path}.properties.{name}", depth + 1)
            except Nothing as error:
                if name in required:
                    raise Nothing(str(error)) from None
                rest = False
        try:
            if rest not in (None, True, False, {}):
                rest = self.schema(rest, f"{path}.additionalProperties", depth + 1)
        except Nothing:
            rest = False
        if rest is False and not patterns:
            for name in required:
                if name not in made:
                    raise Nothing(
                        f"{path}.required names {name[:40]!r}, which additionalProperties forbids; "
                        "add it to properties"
                    )
            node.pop("propertyNames", None)
        if node.get("minProperties", 0) > max(1, len(required)) and (rest is not False or patterns):
            closed = bool(made) and rest is None  # as names are given
            if not closed:
                self.leave_out(f"{path}.minProperties", "stands where keys may be repeated")
                del node["minProperties"]
        if patterns:
            node.update(self.patterned(patterns, rest, path, depth))
        elif rest is not None:
            node["additionalProperties"] = {} if rest is True else rest
            if node["additionalProperties"] == {}:
                node["additionalProperties"] = True
        return {**node, "properties": made} if made or "properties" in node else node

    def patterned(self, patterns: Node, rest: Any, path: str, depth: int) -> Node:
        """One pattern, whose values satisfy all: less than might be, and never more."""
        where = f"{path}.patternProperties"
        if self.strict and (len(patterns) > 1 or rest not in (None, False)):
            raise SchemaError(
                f"{where} is supported with one pattern and additionalProperties: false only"
            )
        every: Any = True
        for schema in patterns.values():
            every = both(every, schema)
        schema = self.schema(every, where, depth + 1)
        return {
            "patternProperties": {next(iter(patterns)): schema},
            "additionalProperties": False,
        }

    def finite_names(self, schema: Any, path: str) -> list[str] | None:
        """The names that propertyNames allows, where they are listed."""
        node = self.flat(schema, f"{path}.propertyNames", True)
        groups = node.pop(ANY, [])
        if "enum" in node:
            values = self.values({**node, ANY: groups} if groups else node, path)["enum"]
            return [value for value in values if isinstance(value, str)]
        if len(groups) != 1 or set(node) - {"type"}:
            return None
        found: list[str] = []
        for branch in groups[0][1]:
            names = self.finite_names(branch, path)
            if names is None:
                return None
            found += names
        return list(dict.fromkeys(found))


def _is_valid(checker: Any, value: Any) -> bool:
    check_effort()
    return bool(checker.is_valid(value))

"""The texts around calls whose arguments have tags of their own, and grammars of such calls.

What a schema says of a string holds for the text as it stands, without quotes; of all else for its
JSON. This file does not know how calls are read.
Source: xgrammar's structural tag format, in its parts that TensorRT-LLM takes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginehouse.runtime.grammar.string_formats import COMBINED, PATTERNS
from enginehouse.server.formats.typed_arguments import bare_text, kinds_of, resolved

Tag = dict[str, Any]
_OF_STRING = ("pattern", "format", "minLength", "maxLength")
_NOTHING: Tag = {"type": "const_string", "value": ""}


@dataclass(frozen=True, slots=True)
class Layout:
    """The texts of one format, in the order in which they stand. pad: around an argument's value.

    section, section_end: around all calls; empty: each call stands alone.
    """

    call: str
    name_end: str
    key: str
    key_end: str
    value_end: str
    call_end: str
    pad: str = ""
    section: str = ""
    section_end: str = ""
    between: str = "\n"

    def call_text(self, name: str, arguments: Mapping[str, Any]) -> str:
        written = [
            f"{self.key}{key}{self.key_end}{self.pad}{bare_text(value)}{self.pad}{self.value_end}"
            for key, value in arguments.items()
        ]
        return f"{self.call}{name}{self.name_end}{''.join(written)}{self.call_end}"

    def arguments_tag(self, schema: Mapping[str, Any]) -> Tag:
        """What stands between a call's name and its end, by the schema of an object."""
        return self._object(schema, schema)

    def _object(self, schema: Any, root: Mapping[str, Any]) -> Tag:
        schema = resolved(schema, root)
        if parts := schema.get("anyOf") or schema.get("oneOf"):
            return _one_of([self._object(part, root) for part in parts])
        if "enum" in schema:
            texts = [self.call_text("", value) for value in schema["enum"]]
            around = len(self.call + self.name_end), len(self.call_end)
            return _texts([text[around[0] : len(text) - around[1]] for text in texts])
        properties = schema.get("properties", {})
        if not properties and schema.get("additionalProperties", True) is not False:
            return {"type": "regex", "pattern": self._any_arguments(schema)}
        required = schema.get("required", ())
        tags = [
            self._argument(name, each, root) if name in required else _maybe(tag)
            for name, each in properties.items()
            for tag in [self._argument(name, each, root)]
        ]
        return {"type": "sequence", "elements": tags} if tags else _NOTHING

    def _any_arguments(self, schema: Mapping[str, Any]) -> str:
        """Of a function that takes any: what may end a value ends it."""
        end = self.value_end.strip()
        value = f"([^<]|<[^/]|</[^{end[2]}])*"
        least = schema.get("minProperties", 0)
        most = schema.get("maxProperties", "")
        key = f"{_escaped(self.key)}[A-Za-z0-9_.-]{{1,64}}{_escaped(self.key_end + self.pad)}"
        return f"({key}{value}{_escaped(self.value_end)}){{{least},{most}}}"

    def _argument(self, name: str, schema: Any, root: Mapping[str, Any]) -> Tag:
        """A whole argument, its tags included."""
        tag = {"type": "tag", "begin": f"{self.key}{name}{self.key_end}{self.pad}"}
        if _takes_any_text(schema, root):
            return {**tag, "content": {"type": "any_text"}, "end": self.value_end}
        return {**tag, "content": _value(schema, root), "end": self.pad + self.value_end}


def _takes_any_text(schema: Any, root: Mapping[str, Any]) -> bool:
    schema = resolved(schema, root)
    if schema is True or schema == {}:
        return True
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return any(_takes_any_text(part, root) for part in parts)
    held = any(key in schema for key in (*_OF_STRING, "enum", "const"))
    return "string" in kinds_of(schema, root) and not held


def _value(schema: Any, root: Mapping[str, Any]) -> Tag:
    schema = resolved(schema, root)
    if "string" not in kinds_of(schema, root):
        defs = {"$defs": root["$defs"]} if "$defs" in root else {}
        return {"type": "json_schema", "json_schema": {**schema, **defs}}
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return _one_of([_value(part, root) for part in parts])
    if "enum" in schema or "const" in schema:
        return _texts([bare_text(value) for value in schema.get("enum", [schema.get("const")])])
    return {"type": "regex", "pattern": _pattern(schema)}


def _pattern(schema: Mapping[str, Any]) -> str:
    if "pattern" in schema:
        return str(schema["pattern"])
    if "format" in schema:
        return {**COMBINED, **PATTERNS}[schema["format"]]
    return f"^[^\\x00]{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}$"


def _texts(texts: list[str]) -> Tag:
    return _one_of([{"type": "const_string", "value": text} for text in texts])


def _one_of(tags: list[Tag]) -> Tag:
    return tags[0] if len(tags) == 1 else {"type": "or", "elements": tags}


def _maybe(tag: Tag) -> Tag:
    return {"type": "or", "elements": [tag, _NOTHING]}


def _escaped(text: str) -> str:
    """For a regular expression."""
    return "".join(f"\\{char}" if char in "[](){}.*+?|^$\\" else char for char in text)

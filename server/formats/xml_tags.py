"""The texts around calls whose arguments have tags of their own, and grammars of such calls.

What a schema says of a string holds for the text as it stands, without quotes; of all else for its
JSON. This file does not know how calls are read.
Source: xgrammar's structural tag format, in its parts that TensorRT-LLM takes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.string_formats import COMBINED, PATTERNS
from enginehouse.server.formats.typed_arguments import alternatives, bare_text, kinds_of

Tag = dict[str, Any]
_OF_OBJECT = ("maxProperties", "patternProperties", "propertyNames")
_OF_STRING = ("pattern", "format", "minLength", "maxLength")
_NOTHING: Tag = {"type": "grammar", "grammar": 'root ::= ""'}
_NAME: Tag = {"type": "regex", "pattern": "[A-Za-z0-9_.-]{1,64}"}


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

    def call_tags(self, name: str, schema: Mapping[str, Any]) -> list[Tag]:
        """Calls of one function, whose arguments are an object of the schema."""
        begin = f"{self.call}{name}{self.name_end}"
        tags: list[Tag] = []
        for content, end in self._objects(schema, schema):
            if content is None:  # xgrammar 0.1 wants some content
                content, end = {"type": "const_string", "value": end}, ""
            tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
        return tags

    def _objects(self, schema: Any, root: Mapping[str, Any]) -> list[tuple[Tag | None, str]]:
        """Alternatives of what stands between a call's name and its end, and of that end."""
        parts = alternatives(schema, root)
        return [each for part in parts for each in self._object(part, root)]

    def _object(
        self, schema: Mapping[str, Any], root: Mapping[str, Any]
    ) -> list[tuple[Tag | None, str]]:
        end = self.call_end
        if "enum" in schema:
            written = (self.call_text("", value) for value in schema["enum"])
            texts = [text.removeprefix(self.call + self.name_end) for text in written]
            return [(None, text) for text in texts]
        properties = schema.get("properties", {})
        _check(schema, not properties)
        if not properties and schema.get("additionalProperties", True) is not False:
            none = [] if schema.get("minProperties") else [(None, end)]
            return [self._any_arguments(), *none]
        required = schema.get("required", ())
        tags = [
            tag if name in required else {"type": "or", "elements": [tag, _NOTHING]}
            for name, each in properties.items()
            for tag in [self._argument(name, each, root)]
        ]
        return [({"type": "sequence", "elements": tags} if tags else None, end)]

    def _any_arguments(self) -> tuple[Tag, str]:
        """One or more, of any name and value; the line break of the last one is the end's."""
        closing = self.value_end.rstrip()
        begin = self.key_end + self.pad
        value = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": closing}
        content = {"type": "sequence", "elements": [_NAME, value]}
        tag = {"type": "tag", "begin": self.key, "content": content, "end": ""}
        listed: Tag = {"type": "tags_with_separator", "tags": [tag], "separator": "\n"}
        return {**listed, "at_least_one": True}, f"\n{self.call_end}"

    def _argument(self, name: str, schema: Any, root: Mapping[str, Any]) -> Tag:
        """A whole argument, its tags included."""
        tag = {"type": "tag", "begin": f"{self.key}{name}{self.key_end}{self.pad}"}
        if _takes_any_text(schema, root):
            return {**tag, "content": {"type": "any_text"}, "end": self.value_end}
        return {**tag, "content": _value(schema, root), "end": self.pad + self.value_end}


def _check(schema: Mapping[str, Any], names_none: bool) -> None:
    """RequestError for what can be said of arguments and not be held so."""
    found = ["minProperties"] if schema.get("minProperties", 0) > _least(schema, names_none) else []
    if names_none:
        found += [key for key in _OF_OBJECT if key in schema]
        if isinstance(schema.get("additionalProperties"), Mapping):
            found.append("additionalProperties")
    if found:
        raise RequestError(
            f"tools: a function has {found[0]}, which this model's calls cannot be held to; name "
            'its arguments in properties, or leave out strict and a tool_choice other than "auto"',
            param="tools",
            code="invalid_value",
        )


def _least(schema: Mapping[str, Any], names_none: bool) -> int:
    """How many arguments there are in any case."""
    return 1 if names_none else len(schema.get("required", ()))


def _takes_any_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Any of its alternatives is a string of which nothing more is said."""
    return any(
        "string" in kinds_of(each, root)
        and (each is True or not any(key in each for key in (*_OF_STRING, "enum", "const")))
        for each in alternatives(schema, root)
    )


def _value(schema: Any, root: Mapping[str, Any]) -> Tag:
    return _one_of([_alternative(each, root) for each in alternatives(schema, root)])


def _alternative(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Tag:
    if "string" not in kinds_of(schema, root):
        defs = {"$defs": root["$defs"]} if "$defs" in root else {}
        return {"type": "json_schema", "json_schema": {**schema, **defs}}
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

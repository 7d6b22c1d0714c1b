"""What a format of calls is: how calls look, how they are read, and how they are enforced.

Most formats are a few texts around `{"name": ..., "arguments": {...}}`; those texts make the
parser's openings, the replay of past calls, the words that teach a model the format, and the
structural tags that hold it to it. This file knows no request and no template.
Source of the tags: xgrammar's structural tag format, in its parts that TensorRT-LLM takes too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.server.text.answer import AnswerParser, PlainParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.json_reader import to_json
from enginehouse.server.tools.unenforced import Unenforced, plain_of, unenforced

_NO_PARAMETERS = {"type": "object", "properties": {}}
_COMBINED = ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")


@dataclass(frozen=True, slots=True)
class ToolFunction:
    """One of a request's functions. parameters: a JSON schema; None takes no arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def to_template(self) -> dict[str, Any]:
        """As a chat template reads it: `{"type": "function", "function": {...}}`."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters or _NO_PARAMETERS)
        return {"type": "function", "function": function}

    def declared(self) -> dict[str, Any]:
        """What the arguments must be, as the request says it."""
        schema = dict(self.parameters or {**_NO_PARAMETERS, "additionalProperties": False})
        if not any(key in schema for key in _COMBINED):
            schema = {"type": "object", **schema}
        return schema

    def schema(self) -> dict[str, Any]:
        """What the arguments are held to: of a strict function all that is declared."""
        return plain_of(self.declared(), self.strict).schema

    def unenforced(self, param: str) -> tuple[Unenforced, ...]:
        """What of the schema, which `check_schema` has passed, is not enforced."""
        declared = self.declared()
        return unenforced(declared, plain_of(declared, self.strict), param, self.name)

    def check_schema(self, param: str) -> None:
        """RequestError at `param` when it is no object's, or cannot be enforced."""
        schema = self.declared()
        message = None
        if schema.get("type", "object") != "object":
            message = 'the arguments of a function are an object; wanted "type": "object"'
        else:
            try:
                plain_of(schema, self.strict)
            except SchemaError as error:
                message = str(error)
        if message is not None:
            raise RequestError(f"{param}: {message}", param=param, code="invalid_value")


class Format:
    """How one family of models writes calls.

    An answer's calls are `opening`, then for each call `before`, the name, `middle`, the JSON text
    of the arguments and `after`, with `between` between two, then `closing`.
    trigger: the text that a call begins with and nothing else does; empty: a call is recognised by
    the name of a function in its place. kept: the texts here that may be special tokens, which the
    text of an answer must show. in_template: a template that knows tools writes this format.
    """

    name: str
    kept: tuple[str, ...] = ()
    in_template = True
    trigger = ""
    opening = ""
    before = '{"name": "'
    middle = '", "arguments": '
    after = "}"
    between = "\n"
    closing = ""

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        """Reads an answer's calls of the functions named; at most max_calls are given."""
        raise NotImplementedError

    def reader(
        self, functions: Sequence[ToolFunction], max_calls: int | None = None
    ) -> AnswerParser:
        """The same, where the functions' schemas say of what type an argument is."""
        return self.parser([item.name for item in functions], max_calls)

    def plain(self) -> AnswerParser:
        """Reads an answer where there is no function to call."""
        return PlainParser()

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them."""
        written = [
            f"{self.before}{call.name}{self.middle}{to_json(dict(call.arguments))}{self.after}"
            for call in calls
        ]
        return self.opening + self.between.join(written) + self.closing

    def system_text(self, functions: Sequence[ToolFunction]) -> str:
        """What a model is told whose template knows no tools."""
        listed = "\n".join(to_json(item.to_template()["function"]) for item in functions)
        example = self.call_text([ToolCall("", "function_name", {"argument_name": "value"})])
        return (
            f"You can call these functions, each given with the JSON schema of its parameters:\n"
            f"{listed}\n\n"
            f"To call a function, answer with its name and arguments in this form and nothing "
            f"else:\n{example}\n\n"
            f"If no function is needed, answer in plain text."
        )

    def forced(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any]:
        """A structural tag's format: calls and nothing else; exactly one unless parallel."""
        calls = self._calls(functions, parallel)
        if not self.opening:
            return calls
        return {"type": "tag", "begin": self.opening, "content": calls, "end": self.closing}

    def free(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any] | None:
        """Text in which calls may begin, each held to its form; None where no tag can say that.

        The arguments of a function that is not strict are any object.
        """
        loose = [
            item if item.strict else ToolFunction(item.name, item.description, {"type": "object"})
            for item in functions
        ]
        if self.opening:
            calls = self._calls(loose, parallel)
            tags = [{"type": "tag", "begin": self.opening, "content": calls, "end": self.closing}]
        else:
            tags = self._tags(loose)
        triggers = [self.trigger]
        if not self.trigger:
            triggers = [f"{self.before}{item.name}{self.middle[0]}" for item in functions]
        return {
            "type": "triggered_tags",
            "triggers": triggers,
            "tags": tags,
            "at_least_one": False,
            "stop_after_first": not parallel,
        }

    def _calls(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any]:
        tags = self._tags(functions)
        if not parallel:
            return {"type": "or", "elements": tags}
        calls = {"type": "tags_with_separator", "tags": tags, "at_least_one": True}
        if self.between:
            return {**calls, "separator": self.between}
        for tag in tags:  # xgrammar 0.1 wants a separator: what each call begins with is one
            tag["begin"] = tag["begin"].removeprefix(self.before)
        first = {"type": "const_string", "value": self.before}
        return {"type": "sequence", "elements": [first, {**calls, "separator": self.before}]}

    def _tags(self, functions: Sequence[ToolFunction]) -> list[dict[str, Any]]:
        tags = []
        for item in functions:
            content = {"type": "json_schema", "json_schema": item.schema()}
            begin = f"{self.before}{item.name}{self.middle}"
            tags.append({"type": "tag", "begin": begin, "content": content, "end": self.after})
        return tags


def once(tag: dict[str, Any]) -> dict[str, Any]:
    """The same as a list of one tag: xgrammar 0.1 lets such lists stand beside their like only."""
    tags = [{"type": "tag", "begin": "", "content": tag, "end": ""}]
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": True,
    }

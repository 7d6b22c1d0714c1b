"""Llama 3.x and Nemotron: bare JSON objects, `;` between them. And the generic format, alike.

    {"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ...}

`<|python_tag|>` may stand before them; it is a special token of Llama's vocabularies.
Source: Meta's prompt format for Llama 3.1, "JSON based tool calling".
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, skip_space

PYTHON_TAG = "<|python_tag|>"


class BareJsonParser(CallParser):
    """Objects at the start of a line; between two of them white space, `;` or `,`."""

    bare_openings = "{"

    def _read(self, opening: str) -> Reader:
        if opening in self.openings and (yield from skip_space()) != "{":
            raise NotACall
        while True:
            yield from self._read_object()
            taken = yield
            while taken == "}" or taken.isspace():  # a brace too many belongs to the call
                taken = taken.removeprefix("}") + (yield)
            if taken[-1] not in ";,":
                return taken
            char = yield
            while char.isspace():
                taken += char
                char = yield
            if char != "{":
                return taken + char


class LlamaJsonParser(BareJsonParser):
    openings = (PYTHON_TAG,)


class LlamaJson(Format):
    name = "llama3_json"
    kept = (PYTHON_TAG,)
    middle = '", "parameters": '
    between = "; "

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return LlamaJsonParser(names, max_calls)


class GenericJson(Format):
    """Of models that were taught no format: the system text teaches this one."""

    name = "json"
    in_template = False

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return BareJsonParser(names, max_calls)

"""LFM2: a list of Python calls between two tokens, or of JSON objects where the prompt asks for it.

    <|tool_call_start|>[get_weather(city="Paris"), get_time()]<|tool_call_end|>
    <|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|tool_call_end|>

A grammar holds a call to the second form, as no JSON schema holds for Python text.
Source: LFM2's model card and the chat template of LFM2.5; SGLang's reading of both forms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from enginehouse.server.formats.hermes import TaggedParser
from enginehouse.server.formats.pythonic import PythonicParser, python_text
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import Reader, read_literal, skip_space

_START, _END = "<|tool_call_start|>", "<|tool_call_end|>"


class Lfm2Parser(TaggedParser, PythonicParser):
    openings = (_START,)
    bare_openings = ""
    close = _END

    def _read(self, opening: str) -> Reader:
        char = yield from skip_space()
        is_list = char == "["
        if is_list:
            char = yield from skip_space()
        if char == "{" or not is_list:
            return (yield from self._read_objects(char, is_list))
        while (yield from self._read_call(char)) != "]":
            char = yield from skip_space()
        return (yield from read_literal(self.close))


class Lfm2(Format):
    name = "lfm2"
    kept = (_START, _END)
    trigger = _START
    opening = f"{_START}["
    between = ", "
    closing = f"]{_END}"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return Lfm2Parser(names, max_calls)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        return _START + python_text(calls) + _END

"""Hermes, and Qwen since 2.5: a JSON object between two tags, one pair for each call.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

The tags are added tokens of Qwen's vocabularies. A closing tag that a model forgets is not missed.
Source: NousResearch, Hermes-Function-Calling; Qwen2.5's chat template.
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, read_literal, skip_space

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallParser):
    openings = (OPEN,)

    def _read(self, opening: str) -> Reader:
        if (yield from skip_space()) != "{":
            raise NotACall
        yield from self._read_object()
        return (yield from read_literal(CLOSE))


class Hermes(Format):
    name = "hermes"
    kept = (OPEN, CLOSE)
    trigger = OPEN
    before = OPEN + '\n{"name": "'
    after = "}\n" + CLOSE

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return HermesParser(names, max_calls)

"""Calls between two tags: of Hermes and Qwen since 2.5 each call, of others a list of calls.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

    <TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {...}]</TOOLCALL>
    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {...}]

The second is Nemotron's, the third Granite's 3; Phi-4-mini closes it by `<|/tool_call|>`.

Hermes' tags are added tokens of Qwen's vocabularies. What models do otherwise is read too: several
calls in one pair of tags, as a list or not, a brace too many, a closing tag that is forgotten.
Source: NousResearch, Hermes-Function-Calling; the chat templates of Qwen2.5, Llama 3.1 Nemotron
Nano, Llama 3.3 Nemotron Super and Granite 3.0 to 3.3; the model card of Phi-4-mini.
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, read_literal, skip_space


class TaggedParser(CallParser):
    """Objects between `openings[0]` and `close`."""

    close: str

    def _read(self, opening: str) -> Reader:
        char = yield from skip_space()
        is_list = char == "["
        if is_list:
            char = yield from skip_space()
        return (yield from self._read_objects(char, is_list))

    def _read_objects(self, char: str, is_list: bool) -> Reader:
        """Objects, the first of which begins with char, and what closes them."""
        if char != "{":
            raise NotACall
        while True:
            yield from self._read_object()
            space = ""
            while (char := (yield)).isspace() or char in ",]}":
                space += char if char.isspace() else ""
                if char == "]" and is_list:
                    return (yield from read_literal(self.close))
            if char != "{":
                break
        taken = char
        while self.close.startswith(taken) and taken != self.close:
            taken += yield
        return "" if taken == self.close else space + taken


class HermesParser(TaggedParser):
    openings = ("<tool_call>",)
    close = "</tool_call>"


class NemotronParser(TaggedParser):
    openings = ("<TOOLCALL>",)
    close = "</TOOLCALL>"


class BarredParser(TaggedParser):
    openings = ("<|tool_call|>", "<tool_call>")  # Granite 3.1 may write it without bars
    close = "<|/tool_call|>"


class Hermes(Format):
    name = "hermes"
    kept = ("<tool_call>", "</tool_call>")
    trigger = "<tool_call>"
    before = '<tool_call>\n{"name": "'
    after = "}\n</tool_call>"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return HermesParser(names, max_calls)


class Nemotron(Format):
    name = "nemotron"
    kept = ("<TOOLCALL>", "</TOOLCALL>")
    trigger = "<TOOLCALL>"
    opening = "<TOOLCALL>["
    between = ", "
    closing = "]</TOOLCALL>"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return NemotronParser(names, max_calls)


class Granite(Format):
    name = "granite"
    kept: tuple[str, ...] = ("<|tool_call|>",)
    trigger = "<|tool_call|>"
    opening = "<|tool_call|>["
    between = ", "
    closing = "]"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return BarredParser(names, max_calls)


class Phi4Mini(Granite):
    name = "phi4_mini"
    kept = ("<|tool_call|>", "<|/tool_call|>")
    closing = "]<|/tool_call|>"

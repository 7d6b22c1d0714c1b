"""DeepSeek and Kimi K2: the section of calls, each call and its arguments are marked by tokens.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}
    <｜tool▁call▁end｜>...<｜tool▁calls▁end｜>

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
    <|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>...<|tool_calls_section_end|>

Both without the line breaks shown. DeepSeek R1 and V3 have the word `function` in the place of the
name, then the name, and the arguments as a block of JSON; V3.1 has the first form above.
Source: the chat templates of DeepSeek R1, V3, V3.1 and of Kimi K2; Kimi K2's guide to tool calls.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import to_json
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, read_mark, skip_space

_CALLS, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE, FENCE_END = "\n```json\n", "\n```"
_MOST_NAME_CHARS = 100


class SectionParser(CallParser):
    """`begin`, a head up to `separator`, an object, `end`, over and over until `close`."""

    begin: str
    separator: str
    end: str
    close: str

    def _read(self, opening: str) -> Reader:
        return (yield from self._read_calls((yield from skip_space())))

    def _read_calls(self, char: str) -> Reader:
        while True:
            taken = yield from read_mark(self.begin, char)
            taken = yield from read_mark(self.close, taken)
            if taken != self.begin:
                if not self._call_is_whole:
                    raise NotACall
                return "" if taken == self.close else taken
            self._call_is_whole = False
            head = ""
            while not head.endswith(self.separator):
                if len(head) > _MOST_NAME_CHARS:
                    raise NotACall
                head += yield
            name = yield from self._read_name(head.removesuffix(self.separator))
            yield from self._stream_object(name)
            taken = ""
            while not taken.endswith(self.end):
                taken += yield
                if not self.end.startswith(taken.lstrip("}` \t\r\n")):  # of a block, or too many
                    return taken
            char = yield from skip_space()

    def _read_name(self, head: str) -> Reader:
        """The function's name, by the head and what follows it up to the object's brace."""
        raise NotImplementedError


class DeepSeekParser(SectionParser):
    openings = (_CALLS,)
    begin, separator, end, close = _CALL, _SEP, _CALL_END, _END

    def _read_name(self, head: str) -> Reader:
        char = yield from skip_space()
        if char == "{":
            return head.strip()
        name = ""
        while char not in "\n{":
            if len(name) > _MOST_NAME_CHARS:
                raise NotACall
            name += char
            char = yield
        taken = char
        while taken[-1] != "{":
            char = yield
            taken += char
            if char != "{" and not FENCE.strip().startswith(taken.strip()):
                raise NotACall
        return name.strip()


class KimiParser(SectionParser):
    openings = ("<|tool_calls_section_begin|>",)
    begin, end = "<|tool_call_begin|>", "<|tool_call_end|>"
    separator, close = "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>"

    def _read_name(self, head: str) -> Reader:
        if (yield from skip_space()) != "{":
            raise NotACall
        found = re.fullmatch(r"\s*(?:functions\.)?(.+?)(?::\d+)?\s*", head, re.S)
        return found[1] if found else ""


class DeepSeekV31(Format):
    name = "deepseek_v31"
    kept = (_CALLS, _END, _CALL, _SEP, _CALL_END)
    trigger = opening = _CALLS
    before = _CALL
    middle = _SEP
    after = _CALL_END
    between = ""
    closing = _END

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return DeepSeekParser(names, max_calls)


class DeepSeekV3(DeepSeekV31):
    """And R1."""

    name = "deepseek_v3"
    before = f"{_CALL}function{_SEP}"
    middle = FENCE
    after = FENCE_END + _CALL_END
    between = "\n"


class KimiK2(Format):
    """Calls are numbered; a number is the model's own and dropped."""

    name = "kimi_k2"
    kept: tuple[str, ...] = (*KimiParser.openings, KimiParser.begin, KimiParser.separator)
    kept += (KimiParser.end, KimiParser.close)
    trigger = opening = KimiParser.openings[0]
    before = f"{KimiParser.begin}functions."
    after = KimiParser.end
    between = ""
    closing = KimiParser.close

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return KimiParser(names, max_calls)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        written = [
            f"{self.before}{call.name}:{index}{KimiParser.separator}"
            f"{to_json(dict(call.arguments))}{self.after}"
            for index, call in enumerate(calls)
        ]
        return self.opening + "".join(written) + self.closing

    def _tags(self, functions: Sequence[ToolFunction]) -> list[dict[str, Any]]:
        return [
            {
                "type": "tag",
                "begin": f"{self.before}{item.name}:",
                "content": {
                    "type": "sequence",
                    "elements": [
                        {"type": "regex", "pattern": "[0-9]{1,3}"},
                        {"type": "const_string", "value": KimiParser.separator},
                        {"type": "json_schema", "json_schema": item.schema()},
                    ],
                },
                "end": self.after,
            }
            for item in functions
        ]

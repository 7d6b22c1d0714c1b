"""Hunyuan: within one tag a tag for each call, its arguments a block of JSON; or a list of objects.

    <tool_calls><tool_call>get_weather
    ```json
    {"city": "Paris"}
    ```</tool_call>
    <tool_call>...</tool_call></tool_calls>

    <tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>

Both are read; which one a model is held to follows from its template.
Source: the chat template of Hunyuan-A13B-Instruct, and vLLM's for it, which asks for the list.
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.formats.hermes import TaggedParser
from enginehouse.server.formats.token_marked import FENCE, FENCE_END, SectionParser
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import NotACall, Reader, read_mark, skip_space

_CALLS, _END = "<tool_calls>", "</tool_calls>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"


class HunyuanParser(SectionParser, TaggedParser):
    openings = (_CALLS,)
    begin, separator, end, close = _CALL, "\n", _CALL_END, _END

    def _read(self, opening: str) -> Reader:
        char = yield from skip_space()
        if char == "[":
            return (yield from self._read_objects((yield from skip_space()), is_list=True))
        return (yield from self._read_calls(char))

    def _read_name(self, head: str) -> Reader:
        char = yield from skip_space()
        fence = FENCE.strip()
        if char != "{" and (yield from read_mark(fence, char)) == fence:
            char = yield from skip_space()
        if char != "{":
            raise NotACall
        return head.strip()


class Hunyuan(Format):
    name = "hunyuan"
    kept: tuple[str, ...] = (_CALLS, _END, _CALL, _CALL_END)
    trigger = opening = _CALLS
    before = _CALL
    middle = FENCE
    after = FENCE_END + _CALL_END
    closing = _END

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return HunyuanParser(names, max_calls)


class HunyuanList(Hunyuan):
    opening = f"{_CALLS}["
    before, middle, after = Format.before, Format.middle, Format.after
    between = ", "
    closing = f"]{_END}"


def hunyuan_of(template: str) -> Hunyuan:
    """The form that a chat template asks for."""
    return HunyuanList() if f"{_CALLS}[" in template else Hunyuan()

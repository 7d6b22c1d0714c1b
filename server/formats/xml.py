"""Calls with a tag around each argument: of Qwen3-Coder, Seed-OSS, MiniMax-M2 and GLM-4.5.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Seed-OSS has `<seed:tool_call>` and no line breaks around a value; MiniMax-M2 writes all calls as
`<invoke name="get_weather">` within one `<minimax:tool_call>`; GLM-4.5 has `<arg_key>` and
`<arg_value>`.
An argument is given when its closing tag is read, as JSON by the function's schema.
Source: the chat templates of these models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from enginehouse.server.formats.typed_arguments import argument_schema, json_of
from enginehouse.server.formats.xml_tags import Layout
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import to_json
from enginehouse.server.tools.parser import (
    CallParser,
    NotACall,
    Reader,
    read_literal,
    read_mark,
    skip_space,
)

_MOST_NAME_CHARS = 64
_SPACE = " \t\r\n"
_QWEN = Layout(
    call="<tool_call>\n<function=",
    name_end=">\n",
    key="<parameter=",
    key_end=">",
    pad="\n",
    value_end="</parameter>\n",
    call_end="</function>\n</tool_call>",
)
_SEED = Layout(
    call="<seed:tool_call>\n<function=",
    name_end=">\n",
    key="<parameter=",
    key_end=">",
    value_end="</parameter>\n",
    call_end="</function>\n</seed:tool_call>",
)
_MINIMAX = Layout(
    section="<minimax:tool_call>\n",
    call='<invoke name="',
    name_end='">\n',
    key='<parameter name="',
    key_end='">',
    value_end="</parameter>\n",
    call_end="</invoke>\n",
    section_end="</minimax:tool_call>",
    between="",
)
_GLM = Layout(
    call="<tool_call>",
    name_end="\n",
    key="<arg_key>",
    key_end="</arg_key>\n<arg_value>",
    value_end="</arg_value>\n",
    call_end="</tool_call>",
)


class XmlParser(CallParser):
    """White space between tags may be any, or none; what follows `</function>` may be missing.

    schemas: of the functions' arguments, by name.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        max_calls: int | None = None,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        head = (layout.section + layout.call).strip(_SPACE)
        opening, _, self._head = head.partition("\n")
        self.openings = (opening,)
        self._layout = layout
        self._schemas = schemas or {}
        super().__init__(names, max_calls)

    def _read(self, opening: str) -> Reader:
        tail = self._layout.section_end
        while True:
            if self._head:
                taken = yield from read_mark(self._head, (yield from skip_space()))
                taken = yield from read_mark(tail, taken)
                if taken != self._head:
                    if not self._call_is_whole:
                        raise NotACall
                    return "" if taken == tail else taken
            rest = yield from self._read_call()
            if rest or not tail:
                return rest

    def _read_call(self) -> Reader:
        """What follows a call's opening; returns what was read behind the call."""
        layout = self._layout
        self._call_is_whole = False
        head = yield from self._read_name()
        mark = layout.name_end.strip(_SPACE)
        name = head[: -len(mark or " ")].strip(_SPACE)
        if name not in self._names:
            raise NotACall
        schema = self._schemas.get(name, {})
        end, _, optional = layout.call_end.strip(_SPACE).partition("\n")
        taken = "" if mark or head[-1] != "<" else "<"
        seen: set[str] = set()
        while True:
            taken = yield from read_mark(layout.key, taken or (yield from skip_space()))
            if taken != layout.key:
                break
            argument = yield from _up_to(layout.key_end)
            text = yield from _up_to(layout.value_end.strip(_SPACE))
            if argument in seen:
                raise NotACall
            if not seen:
                self._start_call(name)
            value = text.removeprefix(layout.pad).removesuffix(layout.pad)
            found = json_of(value, argument_schema(argument, schema), schema)
            self._add_arguments(f"{', ' if seen else '{'}{to_json(argument)}: {found}")
            seen.add(argument)
            taken = ""
        if (yield from read_mark(end, taken)) != end:
            raise NotACall
        if seen:
            self._add_arguments("}")
            self._end_call()
        else:
            self._give_call(name, "{}")
        return (yield from read_literal(optional)) if optional else ""

    def _read_name(self) -> Reader:
        """The name and the mark behind it; without a mark, a line break or the next tag's `<`."""
        mark = self._layout.name_end.strip(_SPACE)
        name = yield from skip_space()
        while not (name.endswith(mark) if mark else name[-1] in "\n<"):
            if len(name) > _MOST_NAME_CHARS + len(mark):
                raise NotACall
            name += yield
        return name


def _up_to(mark: str) -> Reader:
    """The text before a mark; where the mark has a line break, any white space will do."""
    first, _, second = mark.partition("\n")
    text = ""
    while not text.endswith(first):
        text += yield
    if second and (yield from read_mark(second, (yield from skip_space()))) != second:
        raise NotACall
    return text[: -len(first)]


class Qwen3Coder(Format):
    """And Nemotron 3, and what else writes as Qwen3-Coder does."""

    name = "qwen3_coder"
    kept: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    layout = _QWEN

    def __init__(self) -> None:
        layout = self.layout
        self.trigger = (layout.section or layout.call).partition("\n")[0]
        self.opening, self.closing = layout.section, layout.section_end
        self.before, self.between = layout.call, layout.between

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return XmlParser(self.layout, names, max_calls)

    def reader(
        self, functions: Sequence[ToolFunction], max_calls: int | None = None
    ) -> AnswerParser:
        schemas = {item.name: item.declared() for item in functions}
        return XmlParser(self.layout, schemas, max_calls, schemas)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        written = [self.layout.call_text(call.name, call.arguments) for call in calls]
        return self.opening + self.between.join(written) + self.closing

    def _tags(self, functions: Sequence[ToolFunction]) -> list[dict[str, Any]]:
        return [
            tag for item in functions for tag in self.layout.call_tags(item.name, item.schema())
        ]


class SeedOss(Qwen3Coder):
    name = "seed_oss"
    kept = ("<seed:tool_call>", "</seed:tool_call>")
    layout = _SEED


class MiniMaxM2(Qwen3Coder):
    name = "minimax_m2"
    kept = ("<minimax:tool_call>", "</minimax:tool_call>")
    layout = _MINIMAX


class Glm45(Qwen3Coder):
    name = "glm45"
    kept = (*Qwen3Coder.kept, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    layout = _GLM

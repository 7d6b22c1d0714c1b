"""Cohere's Command R7B and Command A: a list of objects between two tokens.

    <|START_ACTION|>[
        {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},
        {...}
    ]<|END_ACTION|>

Calls are numbered over the conversation; a number is the model's own and dropped.
Source: the tool_use chat template of c4ai-command-r7b-12-2024.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from enginehouse.server.formats.hermes import TaggedParser
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import to_json

_START, _END = "<|START_ACTION|>", "<|END_ACTION|>"


class CommandParser(TaggedParser):
    openings = (_START,)
    close = _END
    name_key = "tool_name"
    other_keys = frozenset({"tool_call_id"})


class Command(Format):
    name = "command"
    kept = (_START, _END)
    trigger = _START
    opening = f"{_START}[\n    "
    before = '{"tool_call_id": "'
    middle = '", "parameters": '
    between = ",\n    "
    closing = f"\n]{_END}"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return CommandParser(names, max_calls)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        written = [
            f'{self.before}{index}", "tool_name": "{call.name}{self.middle}'
            f"{to_json(dict(call.arguments))}{self.after}"
            for index, call in enumerate(calls)
        ]
        return self.opening + self.between.join(written) + self.closing

    def _tags(self, functions: Sequence[ToolFunction]) -> list[dict[str, Any]]:
        return [
            {
                "type": "tag",
                "begin": self.before,
                "content": {
                    "type": "sequence",
                    "elements": [
                        {"type": "regex", "pattern": "[0-9]{1,3}"},
                        {
                            "type": "const_string",
                            "value": f'", "tool_name": "{item.name}{self.middle}',
                        },
                        {"type": "json_schema", "json_schema": item.schema()},
                    ],
                },
                "end": self.after,
            }
            for item in functions
        ]

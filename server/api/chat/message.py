"""A choice as OpenAI's chat message, whole and in deltas.

Knows no other part of an answer.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from enginehouse.server.answer.choice import Choice
from enginehouse.server.text.answer import Content, Part, Reasoning, ToolCallStart


def chat_message(choice: Choice, only_calls: bool) -> dict[str, Any]:
    """Of a whole answer; content is null where there is no text, but calls, or nothing else can be.

    What there is none of is left out, but for what OpenAI's schema wants in every message.
    """
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text,
        "refusal": None,
        "annotations": [],
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls or only_calls:
        message["content"] = choice.text or None
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls
        ]
    return message


def chat_deltas(parts: tuple[Part, ...]) -> list[dict[str, Any]]:
    """Neighbours of one kind, and of one call, are told together."""
    deltas: list[dict[str, Any]] = []
    for (kind, number), group in groupby(parts, _kind_of):
        if kind is ToolCallStart:
            deltas += [
                {
                    "tool_calls": [
                        {
                            "index": part.number,
                            "id": part.id,
                            "type": "function",
                            "function": {"name": part.name, "arguments": ""},
                        }
                    ]
                }
                for part in group
                if isinstance(part, ToolCallStart)
            ]
            continue
        text = "".join(part.text for part in group if not isinstance(part, ToolCallStart))
        if kind is Content:
            deltas.append({"content": text})
        elif kind is Reasoning:
            deltas.append({"reasoning_content": text})
        else:
            deltas.append({"tool_calls": [{"index": number, "function": {"arguments": text}}]})
    return deltas


def _kind_of(part: Part) -> tuple[type[Part], int | None]:
    number = None if isinstance(part, (Content, Reasoning)) else part.number
    return type(part), number

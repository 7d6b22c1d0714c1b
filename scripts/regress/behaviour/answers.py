"""Answers, whole and streamed, as what they say: text, tokens, calls, reasons, usage.

A stream is held to its form as it is read. Knows no question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from enginehouse.regress.subject.answers import Entry, entries_of


@dataclass
class Choice:
    """index: the server's. calls: name and arguments of each; thought: reasoning told apart."""

    index: int
    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None

    def parts(self) -> dict[str, object]:
        """What has to be equal in a stream and in a plain answer."""
        return {
            "index": self.index,
            "text": self.text,
            "reasoning": self.thought,
            "calls": self.calls,
            "logprobs": [entry.token for entry in self.entries],
            "finish_reason": self.finish_reason,
        }

    @property
    def said(self) -> str:
        """All of its words: a model that thinks first may say nothing else."""
        return self.thought + self.text

    @property
    def logprobs(self) -> list[float]:
        return [entry.logprob for entry in self.entries]


def choices_of(answer: dict[str, Any]) -> list[Choice]:
    """A whole answer's, of either endpoint."""
    made = []
    for choice in answer["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        one = Choice(
            choice["index"],
            message["content"] or "",
            message.get("reasoning_content") or message.get("reasoning") or "",
            [_call(call["function"]) for call in message.get("tool_calls") or []],
            entries_of(choice.get("logprobs")),
            choice["finish_reason"],
            choice.get("stop_reason"),
        )
        made.append(one)
    return made


@dataclass
class Streamed:
    """What a stream came to. faults: what of its form is not as it has to be."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    usages: int = 0  # events that tell it
    events: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    done: bool = False

    def in_order(self) -> list[Choice]:
        return [self.choices[index] for index in sorted(self.choices)]


def read_stream(lines: Iterable[str]) -> Streamed:
    """The data of its events, as they come."""
    stream, roles = Streamed(), set[int]()
    for line in lines:
        if stream.done:
            stream.faults.append("something came after [DONE]")
        elif line == "[DONE]":
            stream.done = True
        else:
            _take(json.loads(line), stream, roles)
    if not stream.done:
        stream.faults.append("it ended without [DONE]")
    if len({event.get("id") for event in stream.events}) > 1:
        stream.faults.append("its events have more than one id")
    open_ends = [c.index for c in stream.choices.values() if c.finish_reason is None]
    if open_ends or not stream.choices:
        stream.faults.append(f"no finish_reason came for the choices {open_ends or 'at all'}")
    return stream


def _take(event: dict[str, Any], stream: Streamed, roles: set[int]) -> None:
    stream.events.append(event)
    if "error" in event:
        stream.faults.append(f"an error came: {event['error']}")
        return
    if event.get("usage"):
        stream.usage, stream.usages = event["usage"], stream.usages + 1
    for part in event["choices"]:
        index = part["index"]
        choice = stream.choices.setdefault(index, Choice(index))
        if choice.finish_reason is not None:
            stream.faults.append(f"choice {index} went on after its finish_reason")
        choice.finish_reason = part["finish_reason"]
        choice.stop_reason = part.get("stop_reason", choice.stop_reason)
        choice.entries += entries_of(part.get("logprobs"))
        if "delta" in part:
            _take_role(part["delta"], index, stream, roles)
            _take_delta(part["delta"], choice)
        else:
            choice.text += part["text"]


def _take_role(delta: dict[str, Any], index: int, stream: Streamed, roles: set[int]) -> None:
    if "role" in delta and index in roles:
        stream.faults.append(f"the role of choice {index} came twice")
    elif "role" not in delta and index not in roles:
        stream.faults.append(f"choice {index} began without its role")
    roles.add(index)


def _take_delta(delta: dict[str, Any], choice: Choice) -> None:
    choice.text += delta.get("content") or ""
    choice.thought += delta.get("reasoning_content") or delta.get("reasoning") or ""
    for piece in delta.get("tool_calls") or []:
        function = piece["function"]
        if piece["index"] == len(choice.calls):
            choice.calls.append((function["name"], ""))
        name, arguments = choice.calls[piece["index"]]
        choice.calls[piece["index"]] = name, arguments + (function.get("arguments") or "")


def _call(function: dict[str, Any]) -> tuple[str, str]:
    return function["name"], function["arguments"]

"""Harmony, the format of GPT-OSS: an answer is messages, each in a channel and perhaps to somebody.

    <|channel|>analysis<|message|>The weather, then.<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

    <|channel|>final<|message|>It is mild.<|return|>

`analysis` is reasoning, `final` and `commentary` to nobody are content, and a message to
`functions.NAME` is a call, wherever its header names it; a model makes one call in an answer.
`<|call|>` and `<|return|>` end the answer, so that the text mostly ends without them.
Source: OpenAI, "Harmony response format"; the chat template of gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from enginehouse.server.text.answer import Content, Part, Reasoning, ToolArguments, ToolCallStart
from enginehouse.server.text.message import ToolCall
from enginehouse.server.text.reasoning import MARKS, overlap
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import JsonValue, NotJson, to_json
from enginehouse.server.tools.parser import new_call_id

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_HEADS = (_START, _CHANNEL, _MESSAGE, "to=")  # what a header begins with
_MOST_HEADER_CHARS = 300
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_FUNCTIONS = "functions."


class HarmonyParser:
    """An AnswerParser of a whole answer. Text that has no header is content.

    prompt: its text, whose end may be within a message. parted: reasoning is told apart; else it
    is content, its marks included. shown false: and dropped.
    """

    def __init__(
        self,
        names: Collection[str],
        max_calls: int | None = None,
        prompt: str = "",
        parted: bool = True,
        shown: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.num_failed = 0
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._parted, self._shown = parted, shown
        self._new_id = new_id
        self._num_calls = 0
        self._parts: list[Part] = []
        self._told: set[type] = set()  # of which kinds there was a message
        self._kind = "header"  # header, content, reasoning, marked, call, arguments, passed over
        self._value = JsonValue()
        self._held = ""
        _, started, tail = prompt.rpartition(_START)
        header, opened, body = tail.partition(_MESSAGE)
        if started and opened and not any(end in body for end in _ENDS):
            self._enter(header)
            self._told = set()
        elif started and not opened:
            self._held = header.removeprefix("assistant")
        self._parts = []

    @property
    def thinks(self) -> bool:
        return self._kind == "reasoning"

    def push(self, text: str) -> list[Part]:
        self._held += text
        while self._advance():
            pass
        parts, self._parts = self._parts, []
        return parts

    def flush(self) -> list[Part]:
        if self._kind == "header" and not self._held.lstrip().startswith(_HEADS):
            self._kind = "content"
        if self._kind != "header":
            self._give(self._held)
        if self._kind == "arguments":
            self.num_failed += 1
        self._held = ""
        return self.push("")

    def _advance(self) -> bool:
        """Take of the text held what is certain; false: no more is."""
        if self._kind == "header":
            return self._take_header()
        place, end = min(
            ((self._held.find(end), end) for end in _ENDS if end in self._held), default=(-1, "")
        )
        if place < 0:
            certain = len(self._held) - max(overlap(self._held, end) for end in _ENDS)
            self._give(self._held[:certain])
            self._held = self._held[certain:]
            return False
        self._give(self._held[:place])
        self._held = self._held[place + len(end) :]
        if self._kind == "marked":
            self._parts.append(Content(end))
        self.num_failed += self._kind == "arguments"
        self._kind = "header"
        return True

    def _take_header(self) -> bool:
        body = self._held.lstrip()
        place = self._held.find(_MESSAGE)
        if not body.startswith(_HEADS):
            if any(head.startswith(body) for head in _HEADS):
                return False
        elif 0 <= place <= _MOST_HEADER_CHARS:
            header, self._held = self._held[:place], self._held[place + len(_MESSAGE) :]
            self._enter(header)
            return True
        elif place < 0 and len(self._held) <= _MOST_HEADER_CHARS + len(_MESSAGE):
            return False
        self._begin("content", Content)
        return True

    def _enter(self, header: str) -> None:
        recipient = _RECIPIENT.search(header)
        channel = header.rpartition(_CHANNEL)[2].lstrip()
        if recipient is not None:
            name = recipient[1].removeprefix(_FUNCTIONS)
            if recipient[1].startswith(_FUNCTIONS) and name in self._names:
                self._kind, self._name = "call", name
                return
            self.num_failed += 1
        if not channel.startswith("analysis"):
            self._begin("content", Content)
        elif not self._parted:
            self._begin("marked", Content)
            self._parts.append(Content(MARKS["harmony"].open))
        else:
            self._begin("reasoning", Reasoning)

    def _begin(self, kind: str, part: type[Content] | type[Reasoning]) -> None:
        """A second message of a kind is a paragraph of its own."""
        self._kind = kind
        if part in self._told and (self._shown or part is Content):
            self._parts.append(part("\n\n"))
        self._told.add(part)

    def _give(self, text: str) -> None:
        if self._kind == "call":
            text = text.lstrip()
            if text:
                self._begin_call(text)
        if self._kind == "arguments":
            text = self._give_arguments(text)
        if not text:
            return
        if self._kind in ("content", "marked"):
            self._parts.append(Content(text))
        elif self._kind == "reasoning" and self._shown:
            self._parts.append(Reasoning(text))

    def _begin_call(self, text: str) -> None:
        if text[0] != "{":
            self.num_failed += 1
            self._begin("content", Content)
            return
        self._kind, self._value = "arguments", JsonValue()
        self._is_surplus = self._num_calls == self._max_calls
        if not self._is_surplus:
            self._parts.append(ToolCallStart(self._num_calls, self._new_id(), self._name))
            self._num_calls += 1

    def _give_arguments(self, text: str) -> str:
        """The text behind what was no JSON, which is content."""
        taken, is_json = "", True
        for char in text:
            try:
                taken += self._value.take(char)
            except NotJson:
                is_json = False
                break
            if self._value.done:
                self._kind = "passed over"
                break
        if taken and not self._is_surplus:
            self._parts.append(ToolArguments(self._num_calls - 1, taken))
        if is_json:
            return ""
        self.num_failed += 1
        self._begin("content", Content)
        return text[len(taken) :]


class Harmony(Format):
    """For one prompt: whether it ends within a message says how the answer begins."""

    name = "harmony"
    kept = (_START, _CHANNEL, _MESSAGE, "<|constrain|>", *_ENDS)
    trigger = before = "<|channel|>commentary to=functions."
    middle = " <|constrain|>json<|message|>"
    after = ""  # what ends a call ends the answer

    def __init__(self, prompt: str = "", parted: bool = True, shown: bool = True) -> None:
        self._prompt, self._parted, self._shown = prompt, parted, shown

    def parser(self, names: Collection[str], max_calls: int | None = None) -> HarmonyParser:
        return HarmonyParser(names, max_calls, self._prompt, self._parted, self._shown)

    def plain(self) -> HarmonyParser:
        return self.parser(())

    @property
    def in_message(self) -> bool:
        """The prompt ends within a message, which the answer goes on with."""
        _, started, tail = self._prompt.rpartition(_START)
        return bool(started) and _MESSAGE in tail and not any(end in tail for end in _ENDS)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        written = [
            f"{self.before}{call.name}{self.middle}{to_json(dict(call.arguments))}"
            for call in calls
        ]
        return "<|call|><|start|>assistant".join(written)

    def forced(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any]:
        """One call: its end is the answer's."""
        return super().forced(functions, parallel=False)

    def free(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any] | None:
        return super().free(functions, parallel=False)

"""Reasoning at the head of an answer, between two marks, and then the answer itself.

    <think>Two twos.</think>Four.

Some templates open the mark in the prompt, so that the answer begins within it. White space around
the marks belongs to neither side. This file does not know calls, formats or the request.
Source: the output and the chat templates of DeepSeek-R1, QwQ and Qwen3, Magistral, Seed-OSS,
Command R7B and Hunyuan-A13B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from enginehouse.server.text.answer import AnswerParser, Part, Reasoning


class Marks(NamedTuple):
    """What reasoning stands between. then: a regular expression of what may follow it, where an
    answer is held to a grammar. answer: what the answer itself begins with. around: what it stands
    between, perhaps.
    """

    open: str
    close: str
    then: str = r"\n{0,2}"
    answer: str = ""
    around: tuple[str, str] | None = None


THINK = Marks("<think>", "</think>")
MARKS = {
    "granite": Marks("<think>", "</think>", around=("<response>", "</response>")),
    "hunyuan": Marks("<think>", "</think>", around=("<answer>", "</answer>")),
    "think": THINK,
    "magistral": Marks("[THINK]", "[/THINK]"),
    "seed_oss": Marks("<seed:think>", "</seed:think>"),
    "command": Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    "harmony": Marks(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        r"<\|start\|>assistant",
        "<|channel|>final<|message|>",
    ),
}
REASONING_FORMATS = ("auto", "none", *MARKS)
# Texts of a chat template by which its models' marks are known.
_SHOWN = {name: marks.close for name, marks in MARKS.items()} | {
    "granite": "<response></response>",  # alone it parts results of tools elsewhere
    "hunyuan": "<answer>",
    "harmony": "<|channel|>",
}


def marks_of(template: str | None, wanted: str = "auto") -> Marks | None:
    """What the model's reasoning may stand between, as `wanted` says or the chat template; None:
    its answers hold none.
    """
    if wanted == "auto":
        shown = [name for name, text in _SHOWN.items() if text in (template or "")]
        wanted = shown[0] if shown else "none"
    return MARKS.get(wanted)


def opens_reasoning(prompt: str, continued: str = "", marks: Marks = THINK) -> bool:
    """The prompt ends within reasoning, so the answer begins there.

    continued: the text of the assistant's message that the answer goes on with.
    """
    if prompt.rstrip().endswith(marks.open):
        return True
    return continued.rfind(marks.open) > continued.rfind(marks.close)


def goes_on_thinking(continued: str, marks: Marks = THINK) -> bool:
    """The assistant's message that the answer goes on with ends in the words of a thought."""
    _, opened, thought = continued.rpartition(marks.open)
    return bool(opened and thought.strip()) and marks.close not in thought


class ReasoningParser:
    """Splits the reasoning off; what follows it goes to `inner`.

    begun: the answer begins within reasoning. midway: and goes on with words of it, so that its
    first white space parts them. shown false: the reasoning is dropped. Reasoning that is never
    closed is all there is.
    """

    def __init__(
        self,
        inner: AnswerParser,
        begun: bool = False,
        shown: bool = True,
        *,
        midway: bool = False,
        marks: Marks = THINK,
    ) -> None:
        self.num_failed = 0
        self._inner = inner
        self._open, self._close = marks.open, marks.close
        self._shown = shown
        self._begun = begun
        self._state = "thinking" if midway else "before"  # before, thinking, after, answering
        self._held = ""
        self._is_empty = not midway  # no reasoning was given yet: white space is dropped

    @property
    def thinks(self) -> bool:
        return self._state == "thinking" or (self._state == "before" and self._begun)

    def push(self, text: str) -> list[Part]:
        parts = self._push(text)
        self.num_failed = self._inner.num_failed
        return parts

    def _push(self, text: str) -> list[Part]:
        if self._state == "answering":
            return self._inner.push(text)
        self._held += text
        parts: list[Part] = []
        if self._state == "before":
            parts += self._find_opening()
        if self._state == "thinking":
            parts += self._think()
        if self._state == "after" and (rest := self._held.lstrip()):
            self._state, self._held = "answering", ""
            parts += self._inner.push(rest)
        return parts

    def flush(self) -> list[Part]:
        parts: list[Part] = []
        if self._state == "before" and not self._begun:
            parts += self._inner.push(self._held)
        elif self._state in ("before", "thinking"):
            parts += self._give(self._held)
        self._held = ""
        parts += self._inner.flush()
        self.num_failed = self._inner.num_failed
        return parts

    def _find_opening(self) -> list[Part]:
        body = self._held.lstrip()
        if body.startswith(self._open):
            self._state, self._held = "thinking", body.removeprefix(self._open)
        elif self._open.startswith(body):
            return []
        elif self._begun:
            self._state = "thinking"
        else:
            self._state, held, self._held = "answering", self._held, ""
            return self._inner.push(held)
        return []

    def _think(self) -> list[Part]:
        text, closed, rest = self._held.partition(self._close)
        if closed:
            self._state, self._held = "after", rest
            return self._give(text.rstrip())
        if self._is_empty:
            self._held = self._held.lstrip()
        certain = self._held[: len(self._held) - overlap(self._held, self._close)].rstrip()
        self._held = self._held[len(certain) :]
        return self._give(certain)

    def _give(self, text: str) -> list[Part]:
        if self._is_empty:
            text = text.lstrip()
        self._is_empty &= not text
        return [Reasoning(text)] if text and self._shown else []


class AroundParser:
    """Leaves out what an answer stands between, where it begins so; the rest goes to `inner`.

    White space between the marks and the answer is left out too.
    """

    def __init__(self, inner: AnswerParser, around: tuple[str, str]) -> None:
        self._inner = inner
        self._open, self._close = around
        self.num_failed = 0
        self._state = "before"  # before, opened, within, beyond
        self._held = ""

    @property
    def thinks(self) -> bool:
        return self._inner.thinks

    def push(self, text: str) -> list[Part]:
        self._held += text
        if self._state == "before":
            body = self._held.lstrip()
            if body.startswith(self._open):
                self._state, self._held = "opened", body.removeprefix(self._open)
            elif self._open.startswith(body):
                return []
            else:
                self._state = "beyond"
        if self._state == "opened":
            self._held = self._held.lstrip()
            self._state = "within" if self._held else "opened"
        certain = self._held
        if self._state == "within":
            text, closed, rest = self._held.partition(self._close)
            certain = text[: len(text) - overlap(text, self._close)].rstrip()
            if closed:
                self._state, certain = "beyond", text.rstrip() + rest
        self._held = self._held[len(certain) :] if self._state == "within" else ""
        parts = self._inner.push(certain)
        self.num_failed = self._inner.num_failed
        return parts

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        parts = self._inner.push(held) + self._inner.flush()
        self.num_failed = self._inner.num_failed
        return parts


def after_reasoning(tag: dict[str, Any], begun: bool, marks: Marks = THINK) -> dict[str, Any]:
    """A structural tag's format that lets the model think first and holds what follows to `tag`.

    begun: the prompt has opened the reasoning; if not, the model may do so.
    """
    space = {"type": "regex", "pattern": marks.then}
    thought = {
        "type": "tag",
        "begin": "" if begun else marks.open,
        "content": {"type": "any_text"},
        "end": marks.close,
    }
    thinking = {"type": "sequence", "elements": [thought, space, tag]}
    return thinking if begun else {"type": "or", "elements": [thinking, tag]}


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of text may be the beginning of tag."""
    for num in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:num]):
            return num
    return 0

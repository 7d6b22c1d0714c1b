"""`<think>...</think>` at the head of an answer: reasoning, and then the answer itself.

Some templates open the tag in the prompt, so that the answer begins within it. White space around
the tags belongs to neither side. This file does not know calls, formats or the request.
Source: the output of DeepSeek-R1, QwQ and Qwen3, and their chat templates.
"""

from __future__ import annotations

from typing import Any

from enginehouse.server.text.answer import AnswerParser, Part, Reasoning

OPEN, CLOSE = "<think>", "</think>"
REASONING_FORMATS = ("auto", "none", "think")


def reasons(template: str | None, wanted: str = "auto") -> bool:
    """Whether the model's answers may hold reasoning: as `wanted` says, or the chat template."""
    return wanted == "think" or (wanted == "auto" and CLOSE in (template or ""))


def opens_reasoning(prompt: str, continued: str = "") -> bool:
    """The prompt ends within reasoning, so the answer begins there.

    continued: the text of the assistant's message that the answer goes on with.
    """
    return prompt.rstrip().endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE)


def goes_on_thinking(continued: str) -> bool:
    """The assistant's message that the answer goes on with ends in the words of a thought."""
    _, opened, thought = continued.rpartition(OPEN)
    return bool(opened and thought.strip()) and CLOSE not in thought


class ReasoningParser:
    """Splits the reasoning off; what follows it goes to `inner`.

    begun: the answer begins within reasoning. midway: and goes on with words of it, so that its
    first white space parts them. shown false: the reasoning is dropped. Reasoning that is never
    closed is all there is.
    """

    def __init__(
        self, inner: AnswerParser, begun: bool = False, shown: bool = True, *, midway: bool = False
    ) -> None:
        self.num_failed = 0
        self._inner = inner
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
        if body.startswith(OPEN):
            self._state, self._held = "thinking", body.removeprefix(OPEN)
        elif OPEN.startswith(body):
            return []
        elif self._begun:
            self._state = "thinking"
        else:
            self._state, held, self._held = "answering", self._held, ""
            return self._inner.push(held)
        return []

    def _think(self) -> list[Part]:
        text, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = "after", rest
            return self._give(text.rstrip())
        if self._is_empty:
            self._held = self._held.lstrip()
        certain = self._held[: len(self._held) - _overlap(self._held, CLOSE)].rstrip()
        self._held = self._held[len(certain) :]
        return self._give(certain)

    def _give(self, text: str) -> list[Part]:
        if self._is_empty:
            text = text.lstrip()
        self._is_empty &= not text
        return [Reasoning(text)] if text and self._shown else []


def after_reasoning(tag: dict[str, Any], begun: bool) -> dict[str, Any]:
    """A structural tag's format that lets the model think first and holds what follows to `tag`.

    begun: the prompt has opened the reasoning; if not, the model may do so.
    """
    space = {"type": "regex", "pattern": r"\n{0,2}"}
    thought = {
        "type": "tag",
        "begin": "" if begun else OPEN,
        "content": {"type": "any_text"},
        "end": CLOSE,
    }
    thinking = {"type": "sequence", "elements": [thought, space, tag]}
    return thinking if begun else {"type": "or", "elements": [thinking, tag]}


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of text may be the beginning of tag."""
    for num in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:num]):
            return num
    return 0

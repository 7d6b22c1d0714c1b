"""What a model's text is made of: content, reasoning, calls of tools. Knows no format of any model.

A parser is given text as it becomes certain, in pieces of any size, and says what it was. Feeding
the same text in other pieces gives the same parts once neighbours of one kind are joined.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text the model thought to itself."""

    text: str


class ToolCallStart(NamedTuple):
    """A call begins. number counts the calls of this answer from 0; id is `call_` and 24 hex."""

    number: int
    id: str
    name: str


class ToolArguments(NamedTuple):
    """More of a call's arguments, as JSON text; all of a call's together parse as an object."""

    number: int
    text: str


Part = Content | Reasoning | ToolCallStart | ToolArguments


class AnswerParser(Protocol):
    """Of one choice's text. num_failed: things that looked like calls and were not. thinks: what
    comes next is thought, as far as is known.
    """

    num_failed: int

    @property
    def thinks(self) -> bool: ...

    def push(self, text: str) -> list[Part]:
        """What is certain now."""

    def flush(self) -> list[Part]:
        """The text has ended: what was held back is a call that is whole, or content."""


class OnlyCalls:
    """Of an answer that can be nothing but calls: a call that a limit cut short is no content."""

    thinks = False

    def __init__(self, inner: AnswerParser) -> None:
        self._inner = inner
        self.num_failed = 0

    def push(self, text: str) -> list[Part]:
        return self._calls(self._inner.push(text))

    def flush(self) -> list[Part]:
        return self._calls(self._inner.flush())

    def _calls(self, parts: list[Part]) -> list[Part]:
        self.num_failed = self._inner.num_failed
        return [part for part in parts if not isinstance(part, Content)]


class PlainParser:
    """All is content."""

    num_failed = 0
    thinks = False

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        return []

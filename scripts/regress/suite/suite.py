"""What every engine is asked: texts, prompts and tasks. `reading.py` has the form of its file.

Knows no tokenizer: lengths are words and lines.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import msgspec

MAX_TOKENS = 32  # of an answer, where the suite says nothing


class Text(msgspec.Struct, frozen=True):
    """kind: what its perplexity is told with, such as prose or code."""

    name: str
    kind: str
    text: str


class Prompt(msgspec.Struct, frozen=True):
    """A text that is continued, or a conversation that is answered."""

    name: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int = MAX_TOKENS


class Task(msgspec.Struct, frozen=True):
    """A text whose continuation is right when it begins with the answer."""

    name: str
    kind: str
    prompt: str
    answer: str


class Suite(msgspec.Struct, frozen=True):
    """digest: of everything that is asked; answers of two suites are not compared."""

    name: str
    texts: list[Text]
    prompts: list[Prompt]
    tasks: list[Task]

    @property
    def digest(self) -> str:
        return "sha256:" + sha256(msgspec.json.encode(self)).hexdigest()

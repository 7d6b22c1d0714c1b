"""Prompts of exactly so many tokens: English words, new in each round, the same for everyone.

As a chat's message for who renders the template, and as the ids that this comes to for who takes
ids. Words are the engine's tokenizer's own: one token each.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from enginehouse.server.prompt.chat import Chat, load_chat
from enginehouse.server.text.message import ChatMessage

_LONGEST = 1 << 20
_WORDS = (
    "the engine turns a wheel while rain falls on old stone and people walk slowly home with bread "
    "and maps of rivers trains clocks gardens letters music bridges markets winter stories paper "
    "glass iron salt wind"
).split()


class Prompts:
    """Of one engine; each call gives others, and the same ones in every run."""

    def __init__(self, engine: Path, model: str) -> None:
        self._chat: Chat = load_chat(engine)
        self._model = model
        self._random = random.Random(0)
        encode = self._chat.tokenizer.encode
        self._words = [
            word for word in _WORDS if len(encode(f" {word}", add_special_tokens=False).ids) == 1
        ]
        self._around = len(self._ids("Tell:"))

    def make(self, count: int, tokens: int) -> list[dict[str, Any]]:
        """model, text and ids of each."""
        return [self._one(tokens) for _ in range(count)]

    def _one(self, tokens: int) -> dict[str, Any]:
        words = self._random.choices(self._words, k=tokens - self._around)
        text = " ".join(["Tell:", *words])
        ids = self._ids(text)
        assert len(ids) == tokens, f"{len(ids)} tokens; wanted {tokens}"
        return {"model": self._model, "text": text, "ids": ids}

    def _ids(self, text: str) -> list[int]:
        if self._chat.template is None:  # random weights have no use for one
            return list(self._chat.tokenizer.encode(text, add_special_tokens=False).ids)
        return self._chat.prompt([ChatMessage("user", text)], _LONGEST).ids

"""A conversation as requests: what has been said, and what of an answer's stream is new.

Without I/O: the caller sends `Conversation.body` and feeds an AnswerReader the lines that come.
More is forgiven than in stream_reader.py: any server of OpenAI's API is good enough to talk to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from enginehouse.server.client.stream_reader import BrokenStream, parse_chunk


class Piece(NamedTuple):
    """Text as it came; reasoning: the model thinks, and does not answer yet."""

    text: str
    reasoning: bool = False


class Conversation:
    """What has been said to one model. fields: what else each request asks (temperature, ...)."""

    def __init__(self, model: str, system: str | None = None, **fields: Any) -> None:
        self.system = system
        self._asked: dict[str, Any] = {"model": model, **fields}
        self._said: list[dict[str, str]] = []

    def body(self, question: str) -> dict[str, Any]:
        """The request that asks for a streamed answer to a question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            **self._asked,
            "messages": [*system, *self._said, {"role": "user", "content": question}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def keep(self, question: str, answer: str) -> None:
        self._said += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._said.clear()


class AnswerReader:
    """Gathers one answer. num_tokens and cost (dollars): None until the server tells them."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.num_tokens: int | None = None
        self.cost: float | None = None
        self._done = False

    def push(self, line: str) -> list[Piece]:
        """Take a line of the stream; returns what is new. Raises BrokenStream for an error."""
        name, _, data = line.partition(":")
        data = data.removeprefix(" ")
        if name != "data":
            return []
        if data == "[DONE]":
            self._done = True
            return []
        chunk = parse_chunk(data)
        try:
            self._take_usage(chunk.get("usage") or {})
            return [piece for choice in chunk.get("choices") or [] for piece in self._take(choice)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BrokenStream(f"{data[:80]!r} is no chat.completion.chunk") from None

    def _take_usage(self, usage: dict[str, Any]) -> None:
        if "completion_tokens" in usage:
            self.num_tokens = int(usage["completion_tokens"])
        if usage.get("estimated_cost") is not None:
            self.cost = float(usage["estimated_cost"])

    def _take(self, choice: dict[str, Any]) -> list[Piece]:
        delta = choice.get("delta") or {}
        thought = str(delta.get("reasoning_content") or delta.get("reasoning") or "")
        text = str(delta.get("content") or "")
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.text += text
        return [piece for piece in (Piece(thought, reasoning=True), Piece(text)) if piece.text]

    def check_end(self) -> None:
        """Raises BrokenStream when the connection ended before the answer did."""
        if not self._done and self.finish_reason is None:
            raise BrokenStream("the connection ended before the answer did")

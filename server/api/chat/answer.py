"""Token outputs -> OpenAI's chat completion objects, whole and in chunks. Knows no HTTP.

Source: OpenAI's API reference, "Chat"; the product page's answer and stream.
"""

from __future__ import annotations

from typing import Any

import msgspec

from enginehouse.server.answer.chunked import ChunkedCompletion
from enginehouse.server.answer.completion import Delta
from enginehouse.server.api.chat.message import chat_deltas, chat_message
from enginehouse.server.text.answer import Content
from enginehouse.server.text.logprobs import TokenEntry, chat_logprobs

_CONTENT, _NO_CONTENT = b'"content":', b'"content":""'
_encode = msgspec.json.Encoder().encode


class ChatCompletion(ChunkedCompletion):
    """Of one conversation."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._untold: list[list[TokenEntry]] = [[] for _ in self.choices]
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._only_text_is_new = self.terms.num_logprobs is None and not self.terms.continuous_usage

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": chat_message(choice, self.terms.only_calls),
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, (_, choice) in enumerate(self.returned())
        ]
        answer = {**self._head(self.kind), "choices": choices, "usage": self.usage()}
        return {**answer, **self._prompt_logprobs(0)}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk of every choice: the role, once."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(len(self.choices))]

    def told(self, delta: Delta) -> list[dict[str, Any]]:
        """The parts if there are any; then an empty delta when they were the choice's last.

        Log probabilities go with the first of them, and wait where there is none.
        """
        deltas = chat_deltas(delta.parts)
        untold = self._untold[delta.index]
        untold += delta.entries
        chunks = [self._chunk(delta.index, item) for item in deltas]
        if delta.finish_reason is not None:
            ending = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(delta.index, {}, ending))
        if chunks and untold:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(untold)
            self._untold[delta.index] = []
        return chunks

    def told_at_once(self, delta: Delta) -> bytes | None:
        """What stands around the text is encoded once."""
        if len(delta.parts) != 1 or delta.finish_reason is not None or not self._only_text_is_new:
            return None
        [part] = delta.parts
        if type(part) is not Content:
            return None
        around = self._around.get(delta.index)
        if around is None:
            empty = self.framing.event(self._chunk(delta.index, {"content": ""}))
            before, _, after = empty.partition(_NO_CONTENT)
            around = self._around[delta.index] = (before + _CONTENT, after)
        return around[0] + _encode(part.text) + around[1]

    def _logprobs(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self.terms.num_logprobs is None:
            return None
        return chat_logprobs(entries, self.terms.pieces)

    def _chunk(
        self, index: int, delta: dict[str, Any], ending: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None}
        return self._chunk_of({**choice, **(ending or {"finish_reason": None})})

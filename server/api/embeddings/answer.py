"""Vectors of an engine -> OpenAI's list of embeddings.

Knows no HTTP. Source: OpenAI's API reference, "The embedding object".
"""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Any

import msgspec

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server.answer.completion import Completion, Delta, Generation, Terms
from enginehouse.server.answer.framing import CHUNKS

_ENDS = (FinishReason.STOP, FinishReason.LENGTH)
_NUMBER_BYTES = 4


class Embeddings(Completion):
    """One of each prompt. What would be its stream is its one object."""

    framing, id_prefix, operation = CHUNKS, "embd-", "embeddings"

    def __init__(self, terms: Terms, as_base64: bool, **more: Any) -> None:
        super().__init__(terms, **more)
        self._as_base64 = as_base64
        self._vectors: dict[int, bytes] = {}  # by prompt

    @property
    def is_large(self) -> bool:
        return True

    def whole(self) -> dict[str, Any]:
        vectors = [self._told(self._vectors[prompt]) for prompt in range(self.terms.num_prompts)]
        num_tokens = self.num_prompt_tokens
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(vectors)
            ],
            "model": self.terms.model,
            "usage": {**usage, "estimated_cost": self.cost},
        }

    def opening(self) -> list[dict[str, Any]]:
        return []

    def told(self, delta: Delta) -> list[dict[str, Any]]:
        return []

    def closing(self) -> list[dict[str, Any]]:
        return [self.whole()]

    def failing(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        return [error]

    def _advance(self, generation: Generation, index: int, output: TokenOutput) -> Delta | None:
        if output.embedding is not None:
            self._vectors[index] = output.embedding
            if self.queued_s is None:
                self.queued_s = output.queued_s
        elif output.finish_reason in _ENDS:
            raise EngineError(f"the engine sent no embedding of prompt {index}")
        return super()._advance(generation, index, output)

    def _told(self, vector: bytes) -> str | msgspec.Raw:
        if self._as_base64:
            return b64encode(vector).decode()
        numbers = struct.unpack(f"<{len(vector) // _NUMBER_BYTES}f", vector)
        return msgspec.Raw(msgspec.json.encode(numbers))  # each by itself: others run in between

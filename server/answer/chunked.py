"""What OpenAI's chat and text completions have in common: head, usage, and a stream of chunks.

Knows neither's choices. Source: OpenAI's API reference, "The chat completion chunk object".
"""

from __future__ import annotations

from typing import Any

from enginehouse.server.answer.completion import Completion
from enginehouse.server.answer.framing import CHUNKS


class ChunkedCompletion(Completion):
    """kind, chunk_kind: the `object` of a whole answer, and of a chunk."""

    framing = CHUNKS
    kind: str
    chunk_kind: str

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; all that was generated counts. Tokens
        of thoughts are told apart where there are any.
        """
        num_prompt, num_completion = self.num_prompt_tokens, self.num_completion_tokens
        thoughts = self.num_reasoning_tokens
        details = {"completion_tokens_details": {"reasoning_tokens": thoughts}} if thoughts else {}
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            **details,
            "estimated_cost": self.cost,
        }

    def closing(self) -> list[dict[str, Any]]:
        """The usage, when stream_options asked for it."""
        if not self.terms.include_usage:
            return []
        return [{**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}]

    def failing(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        return [error]

    def _prompt_logprobs(self, prompt: int) -> dict[str, Any]:
        """vLLM's field, where it was asked for."""
        most = self.terms.num_prompt_logprobs
        return {} if most is None else {"prompt_logprobs": self.scores[prompt].by_id(most)}

    def _chunk_of(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        if self.terms.continuous_usage:
            chunk["usage"] = self.usage()
        elif self.terms.include_usage:  # OpenAI: it is in every chunk, null in all but the last
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.terms.model,
            "system_fingerprint": self.terms.fingerprint,
        }

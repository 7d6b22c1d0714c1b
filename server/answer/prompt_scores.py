"""What the engine says of a prompt's own tokens, as it comes, in the two shapes it is told in.

An echoed prompt has OpenAI's older shape, as the answer behind it; `prompt_logprobs` has vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from enginehouse.runtime.request import TokenLogprobs
from enginehouse.server.text.detokenizer import Detokenizer, TokenPieces
from enginehouse.server.text.logprobs import LOWEST, TokenEntry


class PromptScores:
    """Of one prompt. ids: all of it. text_span: which of them stand for the text that it came as,
    so that special tokens among these are part of that text.
    """

    def __init__(
        self, ids: Sequence[int], pieces: TokenPieces, text_span: range = range(0)
    ) -> None:
        self._ids = ids
        self._pieces = pieces
        self._text_span = text_span
        self._scores: list[TokenLogprobs] = []

    @property
    def num_missing(self) -> int:
        """Tokens of which nothing is known yet; of the first nothing ever is."""
        return len(self._ids) - 1 - len(self._scores)

    def push(self, scores: Sequence[TokenLogprobs]) -> None:
        self._scores += scores

    def entries(self, num_top: int) -> list[TokenEntry]:
        """As an answer's, each with at most num_top alternatives; the first token has none."""
        detokenizer = Detokenizer(self._pieces, self._pieces.special_ids)
        scores: list[TokenLogprobs | None] = [None, *self._scores]
        entries, start = [], 0
        for index, (token_id, score) in enumerate(zip(self._ids, scores, strict=True)):
            told = score and replace(score, top=score.top[:num_top])
            entries.append(TokenEntry(token_id, start, detokenizer.first, told))
            if token_id not in self._pieces.special_ids or index in self._text_span:
                start += len(detokenizer.push([token_id]))
        return entries

    def by_id(self, num_top: int) -> list[dict[str, Any] | None]:
        """vLLM's shape: null for the first token, then of each its own and the likeliest."""
        told: list[dict[str, Any] | None] = [None]
        for (_, token_id), score in zip(pairwise(self._ids), self._scores, strict=True):
            entries = {}
            for rank, (other, value) in enumerate(score.top[:num_top], start=1):
                entries[str(other)] = self._item(other, value, rank)
            entries[str(token_id)] = self._item(token_id, score.logprob, score.rank)
            told.append(entries)
        return told

    def _item(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = self._pieces.piece(token_id, False).decode(errors="replace")
        if token_id in self._pieces.special_ids:
            text = self._pieces.name(token_id)
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text}

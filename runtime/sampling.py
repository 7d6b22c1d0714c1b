"""From logits to the next token, each sequence by its own parameters and its own randomness.

One uniform number a token, drawn from the sequence's own generator: what its neighbours in
the batch do cannot change it. Knows nothing of batching or text.
Sources: nucleus sampling (Holtzman et al., 2020); min-p (Nguyen et al., 2024); repetition
penalty (Keskar et al., 2019, section 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from enginehouse.runtime.request import SamplingParams

_GREEDY_BELOW = 1e-6  # a temperature so small that dividing by it says nothing
_FIRST_CANDIDATES = 256
_GROWTH = 8


class Matcher(Protocol):
    """What a constraint allows next; its state is that of the text so far.

    failure: why it can be followed no further, if so.
    """

    failure: str | None

    def mask(self, logits: Tensor) -> None:
        """Set what is not allowed to -inf, in place; logits: float32 [vocab_size]."""

    def accept(self, token_id: int) -> None:
        """Go on behind a token that `mask` allowed."""


class SamplingState:
    """One sequence's generator, the token counts its penalties need, and its constraint.

    eos_token_ids: of the engine. stop_ids: what ends this sequence.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.num_generated = 0
        constrained = params.constraint is not None
        ends_by_eos = constrained or not params.ignore_eos
        self.stop_ids = {*params.stop_token_ids, *(eos_token_ids if ends_by_eos else ())}
        early = {*params.stop_token_ids, *eos_token_ids}
        self._not_early = torch.tensor(sorted(i for i in early if 0 <= i < vocab_size))
        self._unwanted = self._not_early[:0]
        if constrained and params.ignore_eos:  # the end of the text is nevertheless one
            self._unwanted = torch.tensor(sorted(eos_token_ids))
        self._biased = torch.tensor([i for i, _ in params.logit_bias], dtype=torch.int64)
        self._biases = torch.tensor([bias for _, bias in params.logit_bias])
        self.random = random.Random(params.seed)  # None: seeded by the operating system
        self.greedy = params.temperature < _GREEDY_BELOW
        self.filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self._counts: Tensor | None = None  # generated tokens, float32 [vocab_size]
        self._seen: Tensor | None = None  # prompt and generated tokens, bool [vocab_size]
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt_ids)] = True

    def shape(self, logits: Tensor) -> None:
        """All that comes before temperature, in place; logits: float32 [vocab_size]."""
        if self.matcher is not None:
            self.matcher.mask(logits)
        if len(self._biased):
            logits.index_add_(0, self._biased, self._biases)
        self.penalize(logits)
        early = self.num_generated < self.params.min_tokens
        self._forbid(logits, self._not_early if early else self._unwanted)

    def _forbid(self, logits: Tensor, token_ids: Tensor) -> None:
        """Unless nothing else is left: a constraint that is fulfilled allows only the end."""
        if len(token_ids):
            kept = logits[token_ids]
            logits[token_ids] = float("-inf")
            if self.matcher is not None and float(logits.max()) == float("-inf"):
                logits[token_ids] = kept

    def accept(self, token_id: int) -> None:
        """Count a token that was generated, and does not end the sequence."""
        self.num_generated += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    def penalize(self, logits: Tensor) -> None:
        """Apply the three penalties in place; logits: float32 [vocab_size]."""
        p = self.params
        if self._seen is not None:
            seen = logits[self._seen]
            penalty = p.repetition_penalty
            logits[self._seen] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            logits -= self._counts * p.frequency_penalty
            logits -= (self._counts > 0).float() * p.presence_penalty


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The next token of each row.

    logits: float32 [rows, vocab_size], changed in place.
    Returns one id a row, -1 for a row with a NaN or infinite largest logit.
    """
    for row, state in zip(logits, states, strict=True):
        state.shape(row)
    best, tokens = logits.max(dim=-1)
    sound = torch.isfinite(best).tolist()
    chosen = [token if ok else -1 for token, ok in zip(tokens.tolist(), sound, strict=True)]
    drawn = [i for i, state in enumerate(states) if sound[i] and not state.greedy]
    for rows, draw in (
        ([i for i in drawn if states[i].filtered], _draw_filtered),
        ([i for i in drawn if not states[i].filtered], _draw),
    ):
        if rows:
            temperatures = torch.tensor([states[i].params.temperature for i in rows])
            scaled = (logits[rows] - best[rows, None]) / temperatures[:, None]  # largest is 0
            for i, token in zip(rows, draw(scaled, [states[i] for i in rows]), strict=True):
                chosen[i] = token
    return chosen


def _pick(weights: Tensor, state: SamplingState) -> int:
    """An index drawn in proportion to weights: [n], by inverting their running sum."""
    total = weights.cumsum(0, dtype=torch.float64)
    point = state.random.random() * float(total[-1])
    index = int(torch.searchsorted(total, point, right=True))
    if index == len(weights):  # the product was rounded up: the last that weighs anything
        index = int(torch.searchsorted(total, float(total[-1])))
    return index


def _draw(scaled: Tensor, states: Sequence[SamplingState]) -> list[int]:
    weights = scaled.exp()
    return [_pick(row, state) for row, state in zip(weights, states, strict=True)]


def _draw_filtered(scaled: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """min_p, then top_k, then top_p, on the largest logits only; never a sort of them all."""
    totals = scaled.logsumexp(dim=-1)
    tokens: list[int] = [-1] * len(states)
    rows = list(range(len(states)))
    size = max([_FIRST_CANDIDATES, *(state.params.top_k for state in states)])
    while rows:
        size = min(size, scaled.shape[1])
        values, ids = scaled[rows].topk(size, dim=-1)
        again = []
        for i, row, row_ids in zip(rows, values, ids, strict=True):
            kept = _keep(row, float(totals[i]), states[i].params, size == scaled.shape[1])
            if kept is None:
                again.append(i)
            else:
                tokens[i] = int(row_ids[_pick(row[:kept].exp(), states[i])])
        rows, size = again, size * _GROWTH
    return tokens


def _keep(logits: Tensor, total: float, params: SamplingParams, whole: bool) -> int | None:
    """How many of these leading candidates survive; None when more of them are needed.

    logits: [n], falling, the first 0. total: log of the sum of exp over the whole vocabulary.
    """
    weights = logits.double().exp()
    kept, mass = len(weights), float(torch.tensor(total, dtype=torch.float64).exp())
    closed = whole  # whether everything that could survive is among the candidates
    if params.min_p > 0.0:
        kept = int((weights >= params.min_p).sum())
        closed = closed or kept < len(weights)
    if params.top_k:
        kept = min(kept, params.top_k)
        closed = True
    if closed and (params.min_p > 0.0 or params.top_k):
        mass = float(weights[:kept].sum())
    elif params.min_p > 0.0:
        return None
    if params.top_p < 1.0:
        running = weights[:kept].cumsum(0)
        needed = int((running < params.top_p * mass).sum()) + 1
        if needed > kept and not closed:
            return None
        kept = min(needed, kept)
    return kept

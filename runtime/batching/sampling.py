"""From logits to the next token, each sequence by its own parameters and its own randomness.

One uniform number a token, drawn from the sequence's own generator: what its neighbours in
the batch do cannot change it. Knows nothing of batching or text.
Sources: nucleus sampling (Holtzman et al., 2020); min-p (Nguyen et al., 2024); repetition
penalty (Keskar et al., 2019, section 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from enginehouse.runtime.machine.device import CPU, index_tensor, to_device
from enginehouse.runtime.request import SamplingParams

T = TypeVar("T")

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

    eos_token_ids: of the engine. stop_ids: what ends this sequence. device: of the logits.
    error: what this sequence's own part of a step raised; no token is chosen for it then.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.error: Exception | None = None
        self.num_generated = 0
        constrained = params.constraint is not None
        ends_by_eos = constrained or not params.ignore_eos
        self.stop_ids = {*params.stop_token_ids, *(eos_token_ids if ends_by_eos else ())}
        early = {*params.stop_token_ids, *eos_token_ids}
        self._not_early = index_tensor(sorted(early), device)
        self._unwanted = self._not_early[:0]
        if constrained and params.ignore_eos:  # the end of the text is nevertheless one
            self._unwanted = index_tensor(sorted(eos_token_ids), device)
        self._biased = index_tensor([i for i, _ in params.logit_bias], device)
        self._biases = to_device(torch.tensor([bias for _, bias in params.logit_bias]), device)
        self.random = random.Random(params.seed)  # None: seeded by the operating system
        # One candidate is no choice: not even among equal logits, which bfloat16 has many of.
        one_left = params.top_k == 1 or params.min_p >= 1.0
        self.greedy = params.temperature < _GREEDY_BELOW or one_left
        self.filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self._counts: Tensor | None = None  # generated tokens, float32 [vocab_size]
        self._seen: set[int] | None = (
            None  # prompt and generated tokens, for the repetition penalty
        )
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        if params.repetition_penalty != 1.0:
            self._seen = set(prompt_ids)
            self._seen_ids = index_tensor(sorted(self._seen), device)

    def attempt(self, work: Callable[[T], None], part: T) -> None:
        """Do work that is this sequence's own: what it raises is no neighbour's business."""
        try:
            work(part)
        except Exception as error:  # of a grammar, of torch, of anything
            self.error = error

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
            logits.index_fill_(0, token_ids, float("-inf"))
            if self.matcher is not None:
                nothing = logits.max() == float("-inf")
                logits[token_ids] = torch.where(nothing, kept, float("-inf"))

    def accept(self, token_id: int) -> None:
        """Count a token that was generated, and does not end the sequence."""
        self.num_generated += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None and token_id not in self._seen:
            self._seen.add(token_id)
            new = index_tensor([token_id], self._seen_ids.device)
            self._seen_ids = torch.cat([self._seen_ids, new])

    def penalize(self, logits: Tensor) -> None:
        """Apply the three penalties in place; logits: float32 [vocab_size]."""
        p = self.params
        if self._seen is not None:
            seen, penalty = logits[self._seen_ids], p.repetition_penalty
            logits[self._seen_ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            logits -= self._counts * p.frequency_penalty
            logits -= (self._counts > 0).float() * p.presence_penalty


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The next token of each row.

    logits: float32 [rows, vocab_size], changed in place.
    Returns one id a row, -1 for a row with a NaN or infinite largest logit, and for one whose own
    part of the work raised: that is its state's `error`.
    """
    for row, state in zip(logits, states, strict=True):
        state.attempt(state.shape, row)
    best, tokens = logits.max(dim=-1)
    chosen = torch.where(torch.isfinite(best), tokens, -1)
    drawn = [i for i, state in enumerate(states) if not state.greedy and state.error is None]
    numbers = {i: states[i].random.random() for i in drawn}

    def choose(rows: Sequence[int]) -> None:
        own = [states[i] for i in rows]
        draw = _draw_filtered if own[0].filtered else _draw
        index = index_tensor(rows, logits.device)
        temperatures = _column(logits, [state.params.temperature for state in own])
        scaled = (logits[index] - best[index, None]) / temperatures  # largest is 0
        column = _column(logits, [numbers[i] for i in rows], torch.float64)
        found = draw(scaled, own, column, chosen[index])
        chosen[index] = torch.where(chosen[index] < 0, -1, found)

    together(choose, [i for i in drawn if states[i].filtered], states)
    together(choose, [i for i in drawn if not states[i].filtered], states)
    found = cast(list[int], chosen.tolist())
    return [-1 if state.error else token for state, token in zip(states, found, strict=True)]


def together(
    work: Callable[[Sequence[int]], None], rows: Sequence[int], states: Sequence[SamplingState]
) -> None:
    """Work on these rows at once; where that raises, on each by itself, so that it is known whose
    it is. It must come to the same when it is done again.
    """
    if not rows:
        return
    try:
        work(rows)
    except Exception:  # said again by the row at fault
        for row in rows:
            states[row].attempt(work, [row])


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row, [rows, 1], where `like` is."""
    return to_device(torch.tensor(values, dtype=dtype).unsqueeze(1), like.device)


def _pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """In each row an index drawn in proportion to its weights, by inverting their running sum.

    weights: [rows, n]; numbers: float64 [rows, 1] in [0, 1). Returns int64 [rows, 1].
    """
    total = weights.cumsum(dim=-1, dtype=torch.float64)
    whole = total[:, -1:].contiguous()
    index = torch.searchsorted(total, numbers * whole, right=True)
    last = torch.searchsorted(total, whole)  # the last that weighs anything, should it round up
    return torch.minimum(index, last).clamp_(max=weights.shape[1] - 1)


def _draw(scaled: Tensor, states: Sequence[SamplingState], numbers: Tensor, best: Tensor) -> Tensor:
    """On a CPU one row at a time, which stays in its caches."""
    size = 1 if scaled.device.type == "cpu" else len(scaled)
    pairs = zip(scaled.split(size), numbers.split(size), strict=True)
    return torch.cat([_pick(rows.exp(), own) for rows, own in pairs]).squeeze(1)


class _Filters(NamedTuple):
    """Of each row, [rows, 1]. total: the sum of exp over the whole vocabulary, float64."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    total: Tensor
    numbers: Tensor


def _draw_filtered(
    scaled: Tensor, states: Sequence[SamplingState], numbers: Tensor, best: Tensor
) -> Tensor:
    """min_p, then top_k, then top_p, on the largest logits only; never a sort of them all.

    best: the token that greedy decoding takes, int64 [rows]; where one survives it is this one.
    """
    vocab_size, params = scaled.shape[1], [state.params for state in states]
    filters = _Filters(
        _column(scaled, [p.top_k for p in params], torch.int64),
        _column(scaled, [p.top_p for p in params], torch.float64),
        _column(scaled, [p.min_p for p in params], torch.float64),
        scaled.logsumexp(dim=-1, keepdim=True).double().exp(),
        numbers,
    )
    size = max([_FIRST_CANDIDATES, *(p.top_k for p in params)])
    enough = all(p.top_k for p in params)  # known without asking the device
    tokens = index_tensor([-1] * len(states), scaled.device)
    left = torch.arange(len(states), device=scaled.device)
    while True:
        size = min(size, vocab_size)
        values, ids = scaled.topk(size, dim=-1)
        kept, closed = _keep(values, filters, size == vocab_size)
        behind = torch.arange(size, device=scaled.device) >= kept
        index = _pick(values.exp().masked_fill_(behind, 0.0), filters.numbers)
        picked = torch.where(kept == 1, best[left, None], ids.gather(1, index))
        tokens[left] = picked.squeeze(1)
        if enough or size == vocab_size or bool(closed.all()):
            return tokens
        again = (~closed).flatten()
        scaled, left = scaled[again], left[again]
        filters = _Filters(*(column[again] for column in filters))
        size *= _GROWTH


def _keep(values: Tensor, filters: _Filters, whole: bool) -> tuple[Tensor, Tensor]:
    """How many of these leading candidates survive, and whether more of them need no look.

    values: [rows, n], falling, the first 0. Returns int64 and bool, [rows, 1].
    """
    top_k, top_p, min_p, total, _ = filters
    weights = values.double().exp()
    size = values.shape[1]
    likely = (weights >= min_p).sum(dim=-1, keepdim=True).clamp_(min=1)  # all where min_p is 0
    limited = top_k > 0
    closed = limited | (likely < size) | whole
    kept = torch.where(limited, torch.minimum(likely, top_k), likely)
    running = weights.cumsum(dim=-1)
    mass = torch.where(limited | (min_p > 0.0), running.gather(1, kept - 1), total)
    inside = torch.arange(size, device=values.device) < kept
    needed = ((running < top_p * mass) & inside).sum(dim=-1, keepdim=True) + 1
    nucleus = top_p < 1.0
    closed = closed | (nucleus & (needed <= kept) & (min_p == 0.0))
    return torch.where(nucleus, torch.minimum(needed, kept), kept), closed

"""From logits to the next token by torch, each sequence by its own parameters and randomness.

One uniform number a token, drawn from the sequence's own generator: what its neighbours in
the batch do cannot change it. Equal logits are ordered by their ids, the lowest first.
`cpu/native/sampling.h` does the same. Knows nothing of batching or text.
Sources: nucleus sampling (Holtzman et al., 2020); min-p (Nguyen et al., 2024); repetition
penalty (Keskar et al., 2019, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.logprobs import likeliest
from enginehouse.runtime.machine.device import index_tensor, to_device

_FIRST_CANDIDATES = 256
_GROWTH = 8


def shape(logits: Tensor, state: SamplingState) -> None:
    """All that comes before temperature, in place; logits: float32 [vocab_size]."""
    if state.matcher is not None:
        forbid(logits, torch.from_numpy(state.matcher.allowed()))
    if len(state.biased):
        logits.index_add_(0, _moved(state.biased, logits), _moved(state.biases, logits))
    penalize(logits, state)
    if len(state.forbidden):
        forbidden = _moved(state.forbidden, logits)
        kept = logits[forbidden]
        logits.index_fill_(0, forbidden, float("-inf"))
        if state.matcher is not None:
            nothing = logits.max() == float("-inf")
            logits[forbidden] = torch.where(nothing, kept, float("-inf"))


def forbid(logits: Tensor, bitmask: Tensor) -> None:
    """Set the tokens whose bit is 0 to -inf, in place; bitmask: int32 [words of 32], on the CPU."""
    words = to_device(bitmask, logits.device)
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    logits.masked_fill_((bits & 1).flatten()[: len(logits)] == 0, float("-inf"))


def penalize(logits: Tensor, state: SamplingState) -> None:
    """Apply the three penalties in place; logits: float32 [vocab_size]."""
    if state.counted is None:
        return
    p, ids = state.params, _moved(state.counted.ids, logits)
    counts, found = _moved(state.counted.counts, logits), logits[ids]
    found = torch.where(found > 0, found / p.repetition_penalty, found * p.repetition_penalty)
    found -= counts * p.frequency_penalty
    logits[ids] = found - (counts > 0).float() * p.presence_penalty


def _moved(values: np.ndarray, logits: Tensor) -> Tensor:
    """A copy where the logits are: what it is made of may grow meanwhile."""
    tensor = torch.tensor(values)
    return to_device(tensor.long() if tensor.dtype == torch.int32 else tensor, logits.device)


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The next token of each row.

    logits: float32 [rows, vocab_size], changed in place.
    Returns one id a row, -1 for a row with a NaN or infinite largest logit, and for one whose own
    part of the work raised: that is its state's `error`.
    """
    for row, state in zip(logits, states, strict=True):
        state.attempt(lambda of_row: shape(*of_row), (row, state))
    best, tokens = logits.max(dim=-1)  # the first of equal ones
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
        chosen[index] = torch.where(chosen[index] < 0, -1, draw(scaled, own, column))

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


def _draw(scaled: Tensor, states: Sequence[SamplingState], numbers: Tensor) -> Tensor:
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


def _draw_filtered(scaled: Tensor, states: Sequence[SamplingState], numbers: Tensor) -> Tensor:
    """min_p, then top_k, then top_p, on the largest logits only; never a sort of them all."""
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
        values, ids = likeliest(scaled, size)
        kept, closed = _keep(values, filters, size == vocab_size)
        behind = torch.arange(size, device=scaled.device) >= kept
        index = _pick(values.exp().masked_fill_(behind, 0.0), filters.numbers)
        tokens[left] = ids.gather(1, index).squeeze(1)
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

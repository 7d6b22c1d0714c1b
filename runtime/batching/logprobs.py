"""Log probabilities of the model's own distribution, for the rows whose requests ask for them.

Taken before constraint, bias, penalties and temperature. Knows nothing of batching or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.batching.sampling import SamplingState, sample
from enginehouse.runtime.machine.device import index_tensor
from enginehouse.runtime.request import TokenLogprobs


class Sampled(NamedTuple):
    """A chosen token, -1 when there is none to choose, and its logprobs if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample_with_logprobs(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """`sample`, and what the untouched logits say of each choice.

    logits: float32 [rows, vocab_size], changed in place. The order of equally likely
    alternatives is that of their ids.
    """
    asked = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
    if not asked:
        return [Sampled(token) for token in sample(logits, states)]
    raw = logits[index_tensor(asked, logits.device)].log_softmax(dim=-1)
    tokens = sample(logits, states)
    counts = [states[i].params.num_logprobs or 0 for i in asked]
    found = dict(zip(asked, _of_rows(raw, [tokens[i] for i in asked], counts), strict=True))
    return [Sampled(token, found.get(i) if token >= 0 else None) for i, token in enumerate(tokens)]


def _of_rows(
    logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    """Of each row the token and its count of alternatives; logprobs: float32 [rows, vocab_size]."""
    size = min(max(counts), logprobs.shape[1])
    index = index_tensor([max(token, 0) for token in tokens], logprobs.device).unsqueeze(1)
    best, ids = logprobs.topk(size, dim=-1)
    rows = torch.cat([logprobs.gather(1, index), best], dim=1).tolist()  # one copy from the device
    for (own, *values), row_ids, count in zip(rows, ids.tolist(), counts, strict=True):
        top = sorted(zip(row_ids, values, strict=True), key=lambda x: (-x[1], x[0]))
        yield TokenLogprobs(own, tuple(top[:count]))

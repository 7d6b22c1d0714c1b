"""Log probabilities of the model's own distribution, for the rows whose requests ask for them.

Taken before constraint, bias, penalties and temperature. Knows nothing of batching or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.batching.sampling import SamplingState, sample
from enginehouse.runtime.batching.sequence import ScoredRow
from enginehouse.runtime.logprobs import logprobs_of_rows
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
    found = dict(zip(asked, logprobs_of_rows(raw, [tokens[i] for i in asked], counts), strict=True))
    return [Sampled(token, found.get(i) if token >= 0 else None) for i, token in enumerate(tokens)]


def score_rows(rows: Sequence[ScoredRow], logits: Tensor) -> list[TokenLogprobs]:
    """What the logits behind each row's token say of the next one.

    logits: float32 [rows, vocab_size], changed in place.
    """
    counts = [row.sequence.request.sampling.num_prompt_logprobs or 0 for row in rows]
    torch.log_softmax(logits, dim=-1, out=logits)
    return list(logprobs_of_rows(logits, [row.next_token for row in rows], counts))

"""Log probabilities of the model's own distribution, for the rows whose requests ask for them.

Taken before constraint, bias, penalties and temperature. Knows nothing of batching or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from enginehouse.runtime.request import TokenLogprobs
from enginehouse.runtime.sampling import SamplingState, sample


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
    raw = logits[asked].log_softmax(dim=-1) if asked else logits
    tokens = sample(logits, states)
    found: dict[int, TokenLogprobs] = {}
    sound = [(i, row) for i, row in zip(asked, raw, strict=False) if tokens[i] >= 0]
    for i, row in sound:
        found[i] = _of_row(row, tokens[i], states[i].params.num_logprobs or 0)
    return [Sampled(token, found.get(i)) for i, token in enumerate(tokens)]


def _of_row(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """logprobs: float32 [vocab_size]."""
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda x: (-x[1], x[0]))
    return TokenLogprobs(float(logprobs[token]), tuple(top))

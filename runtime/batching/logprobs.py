"""An iteration's logits as torch has them: tokens are chosen, and log probabilities told.

Those are of the model's own distribution, before constraint, bias, penalties and temperature.
Knows nothing of batching or text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.runtime.batching.sampling import sample, together
from enginehouse.runtime.batching.sampling_state import Sampled, SamplingState
from enginehouse.runtime.batching.sequence import ScoredRow
from enginehouse.runtime.logprobs import logprobs_of_rows
from enginehouse.runtime.machine.device import index_tensor
from enginehouse.runtime.request import TokenLogprobs


class TorchLogits:
    """Satisfies `model_runner.Logits`. values: float32 [rows, vocab_size], changed in place."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @torch.inference_mode()
    def sample(self, rows: Sequence[int], states: Sequence[SamplingState]) -> list[Sampled]:
        logits = self.values
        if list(rows) != list(range(len(logits))):
            logits = logits[index_tensor(rows, logits.device)]
        return sample_with_logprobs(logits, states)

    @torch.inference_mode()
    def score(self, rows: Sequence[ScoredRow]) -> list[TokenLogprobs | None]:
        counts = [row.sequence.request.sampling.num_prompt_logprobs or 0 for row in rows]
        torch.log_softmax(self.values, dim=-1, out=self.values)
        states = [row.sequence.sampling for row in rows]
        return _look(self.values, [row.next_token for row in rows], counts, states)


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
    own = [states[i] for i in asked]
    counts = [state.params.num_logprobs or 0 for state in own]
    found = _look(raw, [tokens[i] for i in asked], counts, own)
    by_row = dict(zip(asked, found, strict=True))
    return [Sampled(token, by_row.get(i) if token >= 0 else None) for i, token in enumerate(tokens)]


def _look(
    logprobs: Tensor,
    tokens: Sequence[int],
    counts: Sequence[int],
    states: Sequence[SamplingState],
) -> list[TokenLogprobs | None]:
    """Of each row the token and its count of alternatives; logprobs: float32 [rows, vocab_size]."""
    found: dict[int, TokenLogprobs] = {}

    def look(rows: Sequence[int]) -> None:
        whole = len(rows) == len(tokens)  # saves a copy
        own = logprobs if whole else logprobs[index_tensor(rows, logprobs.device)]
        chosen, wanted = [tokens[i] for i in rows], [counts[i] for i in rows]
        found.update(zip(rows, logprobs_of_rows(own, chosen, wanted), strict=True))

    together(look, range(len(tokens)), states)
    return [found.get(i) for i in range(len(tokens))]

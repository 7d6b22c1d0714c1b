"""From rows of logits to what is told of them: a token's log probability, and the likeliest.

Reduced where the logits are, so that nothing as long as the vocabulary leaves the device. Knows no
sequence, no batch and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from enginehouse.runtime.machine.device import index_tensor
from enginehouse.runtime.request import TokenLogprobs

# Of a prompt's logits so many rows are made and reduced at a time: 64 MiB in float32, where the
# vocabulary has 128 Ki tokens.
ROWS_AT_ONCE = 128


def logprobs_of_rows(
    logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    """Of each row the token and its count of alternatives; logprobs: float32 [rows, vocab_size].

    The order of equally likely alternatives is that of their ids. A token of -1 is told as token 0.
    """
    size = min(max(counts), logprobs.shape[1])
    index = index_tensor([max(token, 0) for token in tokens], logprobs.device).unsqueeze(1)
    best, ids = logprobs.topk(size, dim=-1)
    own = logprobs.gather(1, index)
    ranks = (logprobs > own).sum(dim=-1, keepdim=True).float() + 1
    rows = torch.cat([own, ranks, best], dim=1).tolist()  # one copy from the device
    for (value, rank, *values), row_ids, count in zip(rows, ids.tolist(), counts, strict=True):
        top = sorted(zip(row_ids, values, strict=True), key=lambda x: (-x[1], x[0]))
        yield TokenLogprobs(value, tuple(top[:count]), int(rank))

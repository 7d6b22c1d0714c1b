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
    best, ids = likeliest(logprobs, size)
    own = logprobs.gather(1, index)
    ranks = (logprobs > own).sum(dim=-1, keepdim=True).float() + 1
    rows = torch.cat([own, ranks, best], dim=1).tolist()  # one copy from the device
    for (value, rank, *values), row_ids, count in zip(rows, ids.tolist(), counts, strict=True):
        top = tuple(zip(row_ids[:count], values[:count], strict=True))
        yield TokenLogprobs(value, top, int(rank))


def likeliest(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, falling, and their ids: of equal ones the lowest, rising.

    values: float32 [rows, vocab_size], none above 0. Returns float32 and int64, [rows, size]. Waits
    for no GPU.
    """
    vocab_size = values.shape[1]
    found, ids = values, torch.arange(vocab_size, device=values.device)
    if values.device.type == "cpu" and size < vocab_size:  # topk takes any of equal ones
        most, their = values.topk(size + 1, dim=-1)
        if not (most[:, size - 1 : size] == most[:, size:]).any():
            found, ids = most, their
    keys = (found.abs().view(torch.int32).long() << 32) | ids
    chosen = keys.topk(size, dim=-1, largest=False).values & 0xFFFFFFFF
    return values.gather(1, chosen), chosen

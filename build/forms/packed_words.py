"""Integers of few bits in words of 32, as quantisers store them.

Source: AutoAWQ; AutoGPTQ and GPTQModel; auto-round 0.16.1, utils/bit_packing.py (5, 6 and 7 bits);
compressed-tensors (`pack_to_int32`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from enginehouse.runtime.errors import CheckpointError

WORD = 32  # bits
# Nibble i of a word of AutoAWQ's "gemm" holds column 0,2,4,6,1,3,5,7 [i]; this undoes it.
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 [rows, 32 * n / bits] from int32 [rows, n]: unsigned, each from the lowest bit left.

    Of 3, 5, 6 and 7 bits some lie across two words.
    """
    if 8 % bits == 0:
        data = words.reshape(-1).view(torch.uint8).view(len(words), -1)  # little-endian
        parts = [data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(1)
    first = torch.arange(0, words.shape[1] * WORD - bits + 1, bits)
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = wide[:, first // WORD] | wide[:, first // WORD + 1] << WORD
    return (both >> first % WORD & (1 << bits) - 1).to(torch.uint8)


def check_symmetric(module: str, zero: Tensor, middle: int) -> None:
    """CheckpointError for zero points, unsigned, of what a config says has none but the middle."""
    if bool((zero != middle).any()):
        raise CheckpointError(
            f"{module} has zero points other than {middle}, but the checkpoint's "
            "quantization_config says that it is symmetric; one of the two is wrong: download both "
            "again"
        )

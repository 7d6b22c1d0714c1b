"""A writer of HQQ's checkpoints, number by number from its document."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from makers.quantized_writers import HALF, Kind, Writer, Written

PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # integers of a word, the first in the highest bits


def hqq(bits: int, group: int, axis: int, as_float: bool = False) -> Writer:
    """as_float: the words' bytes are called float16 (view_as_float)."""
    rng = np.random.default_rng(17)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        groups = out * inn // group
        rows, columns = (groups, group) if axis == 1 else (group, groups)
        q = rng.integers(0, 1 << bits, (rows, columns))
        each = (rows, 1) if axis == 1 else (1, columns)
        zero = torch.from_numpy(rng.uniform(0, 1 << bits, each)).to(HALF)
        scale = torch.from_numpy(rng.uniform(1.6, 4.8, each) / (1 << bits) / inn**0.5).to(HALF)
        parts, step = PARTS[bits], -(-rows // PARTS[bits])
        padded = np.zeros((parts * step, columns), np.int64)
        padded[:rows] = q
        words = np.zeros((step, columns), np.int64)
        for part in range(parts):
            words |= padded[part * step : (part + 1) * step] << bits * (parts - 1 - part)
        kind = "3bit_32" if bits == 3 else f"{bits}bit_u8"
        stored = {
            "W_q": torch.from_numpy(words).to(torch.int32 if bits == 3 else torch.uint8),
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor([out, inn]),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "packing": torch.tensor([ord(letter) for letter in kind], dtype=torch.uint8),
            "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
            "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        }
        if as_float:
            stored["W_q"] = stored["W_q"].view(HALF)
        weight = (torch.from_numpy(q).double() - zero.double()) * scale.double()
        return stored, weight.float().reshape(out, inn)

    return write


_HQQ = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
HQQ: dict[str, Kind] = {
    "hqq 4 bits": Kind(lambda: hqq(4, 64, 1, as_float=True), _HQQ, ""),
    "hqq 3 bits": Kind(lambda: hqq(3, 64, 1), _HQQ, ""),
    "hqq 2 bits axis 0": Kind(lambda: hqq(2, 64, 0), _HQQ, ""),
    "hqq 8 bits": Kind(lambda: hqq(8, 128, 1), _HQQ, ""),
    "hqq 1 bit": Kind(lambda: hqq(1, 32, 1), _HQQ, ""),
}

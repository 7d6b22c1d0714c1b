"""Writers of integers of any width, in words of 32 bits or in bytes, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from makers.quantized_writers import HALF, Writer, Written


def bit_stream(values: np.ndarray[Any, Any], bits: int) -> Tensor:
    """int32 words of rows of unsigned values, one after the other from the lowest bit on."""
    each = values[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32) & 1
    stream = each.reshape(*values.shape[:-1], -1, 32)
    words = (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


class Integers:
    """u in [0, 2^bits), a zero point and a scale for each group; the groups' order may be drawn."""

    def __init__(
        self,
        bits: int,
        group: int,
        symmetric: bool,
        dtype: torch.dtype = HALF,
        act_order: bool = False,
    ) -> None:
        self.rng = np.random.default_rng(11)
        self.bits, self.group, self.symmetric, self.dtype = bits, group, symmetric, dtype
        self.act_order = act_order

    def linear(self, out: int, inn: int) -> tuple[Any, Any, Tensor, Any, Tensor]:
        """u [out, in], zero and scale [out, groups], the group of each input, the weight."""
        groups = 1 if self.group == -1 else inn // self.group
        top = 1 << self.bits
        u = self.rng.integers(0, top, (out, inn))
        z = self.rng.integers(top // 4, 3 * top // 4, (out, groups))
        if self.symmetric:
            z = np.full((out, groups), top // 2)
        spread = self.rng.uniform(1.6, 4.8, (out, groups)) / top / inn**0.5
        s = torch.from_numpy(spread).to(self.dtype)
        index = np.arange(inn) // (inn // groups)
        if self.act_order:
            index = self.rng.permutation(index)
        weight = torch.from_numpy(u - z[:, index]).double() * s.double()[:, index]
        return u, z, s, index, weight.float()


def gptq(draw: Integers, stored_less: int) -> Writer:
    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, index, weight = draw.linear(out, inn)
        stored = {
            "qweight": bit_stream(u, draw.bits).T.contiguous(),
            "qzeros": bit_stream(z.T - stored_less, draw.bits),
            "scales": s.T.contiguous(),
            "g_idx": torch.from_numpy(index).to(torch.int32),
        }
        return stored, weight

    return write


def packed(draw: Integers) -> Writer:
    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, index, weight = draw.linear(out, inn)
        stored = {
            "weight_packed": bit_stream(u, draw.bits),
            "weight_scale": s,
            "weight_shape": torch.tensor([out, inn]),
        }
        if not draw.symmetric:
            stored["weight_zero_point"] = bit_stream(z.T, draw.bits).T.contiguous()
        if draw.act_order:
            stored["weight_g_idx"] = torch.from_numpy(index).to(torch.int32)
        return stored, weight

    return write


def int8(draw: Integers) -> Writer:
    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, _, weight = draw.linear(out, inn)
        stored = {"weight": torch.from_numpy(u - 128).to(torch.int8), "weight_scale": s}
        if not draw.symmetric:
            stored["weight_zero_point"] = torch.from_numpy(z - 128).to(torch.int8)
        return stored, weight

    return write


def smooth_int8(draw: Integers) -> Writer:
    """ModelOpt's: a scale for each row, and factors of the inputs in float32."""
    write_plain = int8(draw)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        stored, weight = write_plain(module, out, inn)
        factor = torch.from_numpy(draw.rng.uniform(0.5, 2, inn)).float()
        stored["weight_scale"] = stored["weight_scale"].view(-1)
        stored |= {"pre_quant_scale": factor, "input_scale": torch.tensor(0.02)}
        return stored, (weight.double() * factor.double()).float()

    return write

"""NVFP4, MXFP8 and block FP8: choose scales and round. The bytes are block_floats.py's.

Knows single tensors only.
Source: NVFP4 as nvidia-modelopt 0.47 has it (qtensor/nvfp4_tensor.py); OCP Microscaling Formats
1.0, section 6.3; DeepSeek-V3 (2024), section 3.3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.build.forms.block_floats import (
    E2M1_MAX,
    FP8_BLOCK,
    MX_BLOCK,
    NVFP4_BLOCK,
    from_e8m0,
    num_blocks,
    pack_e2m1,
    round_e2m1,
    spread_scale,
    to_e8m0,
)
from enginehouse.runtime.checkpoint.packing import FP8_MAX, to_fp8
from enginehouse.runtime.errors import QuantizationError

_ROWS_AT_ONCE = 1 << 18  # elements that are rounded several times, and stay in the cache
# Of a block's largest magnitude / 6: 1.5 puts it on 4 instead of 6, where steps are finer.
NVFP4_STRETCHES = (1.0, 1.5, 0.95, 0.9, 1.25)
_LEAST_E4M3 = 2.0**-9


class BlockWeight(NamedTuple):
    """q: uint8 [out, in / 2] of e2m1, or float8_e4m3fn [out, in]; scale: one for each block, in its
    format's dtype (uint8: e8m0); second: float32 [1], NVFP4's for the whole tensor.
    """

    q: Tensor
    scale: Tensor
    second: Tensor | None = None


def check_blocks(in_features: int, block: int) -> None:
    if in_features % block:
        raise QuantizationError(
            f"in_features={in_features} cannot be cut into blocks of {block}; choose another form"
        )


def nvfp4_second_scale(amax: float) -> float:
    """NVFP4's scale of a whole tensor: its largest magnitude / (6 * 448); 1 for zeros."""
    return amax / (E2M1_MAX * FP8_MAX) if amax > 0 else 1.0


def nvfp4_scales(weight: Tensor, second: float) -> Tensor:
    """float8_e4m3fn [out, in / 16]: of NVFP4_STRETCHES times each block's largest magnitude / 6,
    the one with the least sum of squared errors.

    weight: float32 [out, in]; second: of the whole tensor.
    """
    out_features, in_features = weight.shape
    check_blocks(in_features, NVFP4_BLOCK[1])
    result = torch.empty(out_features, in_features // NVFP4_BLOCK[1], dtype=torch.float8_e4m3fn)
    step = max(1, _ROWS_AT_ONCE // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        blocks = weight[rows].float().div(second).unflatten(1, (-1, NVFP4_BLOCK[1]))
        largest = blocks.abs().amax(dim=-1, keepdim=True) / E2M1_MAX
        best = best_error = torch.full_like(largest, float("inf"))
        for stretch in NVFP4_STRETCHES:
            scale = (largest * stretch).clamp(_LEAST_E4M3, FP8_MAX).to(torch.float8_e4m3fn).float()
            error = round_e2m1(blocks / scale).mul_(scale).sub_(blocks).square_()
            error = error.sum(-1, keepdim=True)
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
        result[rows] = best.squeeze(-1).to(torch.float8_e4m3fn)
    return result


def quantize_nvfp4(weight: Tensor, second: float | None = None) -> BlockWeight:
    """weight: floating [out, in], in divisible by 16; second: another than the weight's own, where
    several share one.
    """
    if second is None:
        second = nvfp4_second_scale(float(weight.abs().amax()))
    scale = nvfp4_scales(weight, second)
    packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].float()
        divisor = spread_scale(
            scale[rows].float() * second, (len(part), part.shape[1]), NVFP4_BLOCK
        )
        packed[rows] = pack_e2m1(round_e2m1(part / divisor))
    return BlockWeight(packed, scale, torch.tensor([second]))


def nvfp4_round_trip(values: Tensor, second: float) -> Tensor:
    """float32 values [..., in] as they enter an NVFP4 product: blocks of 16 with scales of their
    own, largest magnitude / 6, under one for them all.
    """
    blocks = values.float().div(second).unflatten(-1, (-1, NVFP4_BLOCK[1]))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / E2M1_MAX
    scale = scale.clamp(_LEAST_E4M3, FP8_MAX).to(torch.float8_e4m3fn).float()
    return round_e2m1(blocks / scale).mul_(scale).mul_(second).flatten(-2)


def quantize_mxfp8(weight: Tensor) -> BlockWeight:
    """weight: floating [out, in], in divisible by 32. The scale is the least power of two by which
    no element is beyond 448; 2 ** -127 for zeros.
    """
    check_blocks(weight.shape[1], MX_BLOCK[1])
    blocks = weight.float().unflatten(1, (-1, MX_BLOCK[1]))
    scale = to_e8m0(blocks.abs().amax(dim=-1) / FP8_MAX)
    return BlockWeight(to_fp8(blocks / from_e8m0(scale).unsqueeze(-1)).flatten(1), scale)


def quantize_fp8_blocks(weight: Tensor) -> BlockWeight:
    """weight: floating [out, in]. scale: float32, of each block of 128 by 128 the largest magnitude
    / 448, 1 for zeros; blocks at the end may be smaller.
    """
    shape = (weight.shape[0], weight.shape[1])
    rows, columns = num_blocks(shape, FP8_BLOCK)
    pad = (0, columns * FP8_BLOCK[1] - shape[1], 0, rows * FP8_BLOCK[0] - shape[0])
    padded = functional.pad(weight.float().abs(), pad)
    blocks = padded.view(rows, FP8_BLOCK[0], columns, FP8_BLOCK[1])
    scale = blocks.amax(dim=(1, 3)) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return BlockWeight(to_fp8(weight.float() / spread_scale(scale, shape, FP8_BLOCK)), scale)

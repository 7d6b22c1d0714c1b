"""INT4, INT8 and FP8 as a TensorRT-LLM checkpoint stores them, and back to numbers.

Knows nothing of how scales are chosen (that is `build/forms/quantization.py`).
Source: TensorRT-LLM 1.2.1 checkpoint format, W4A16_AWQ, W8A16 and FP8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite float8_e4m3fn
INT8_MAX = 127


class Int8Weight(NamedTuple):
    """q: int8 [out, in]; scale: [out], in the model's dtype."""

    q: Tensor
    scale: Tensor


def pack_int4(q: Tensor) -> Tensor:
    """Pack pairs of rows into bytes: low nibble the even row, high nibble the odd one.

    q: int8 [out_features, in_features] in [-8, 7], out_features even.
    Returns int8 [out_features // 2, in_features], two's complement nibbles.
    """
    assert q.dtype == torch.int8 and q.shape[0] % 2 == 0
    low = q[0::2].view(torch.uint8) & 0xF
    high = q[1::2].view(torch.uint8) << 4
    return (low | high).view(torch.int8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int8 [out_features, in_features] in [-8, 7]."""
    assert packed.dtype == torch.int8
    low = (packed << 4) >> 4  # arithmetic shifts carry the sign
    high = packed >> 4
    return torch.stack([low, high], dim=1).flatten(0, 1)


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """float32 [out_features, in_features] from packed nibbles and one scale per group.

    scale: floating [out_features, in_features // group_size]. zero: what is added after it,
    [in_features // group_size, out_features].
    """
    q = unpack_int4(packed).float()  # [out, in]
    groups = q.view(*scale.shape, -1) * scale.float().unsqueeze(-1)  # [out, groups, g]
    if zero is not None:
        groups = groups + zero.float().T.unsqueeze(-1)
    return groups.flatten(1)


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 from float8_e4m3fn and its multiplier: [1], or [out_features] for one per row."""
    scale = scale.float()
    return weight.float() * (scale if scale.numel() == 1 else scale.unsqueeze(1))


def to_fp8(values: Tensor) -> Tensor:
    """Round to float8_e4m3fn, values beyond +-448 saturated (a plain cast gives NaN there)."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """What TensorRT-LLM's loader makes of one rank's weight under W8A16.

    weight: floating [out_features, in_features]. One scale per row, its largest magnitude / 128;
    rounding uses that scale in float32, and it is kept in the weight's dtype.
    """
    values = weight.float()
    scale = values.abs().amax(dim=1) / 128
    divisor = torch.where(scale > 0, scale, 1.0)
    q = (values / divisor.unsqueeze(1)).round_().clamp_(-128, INT8_MAX).to(torch.int8)
    return Int8Weight(q, divisor.to(weight.dtype))

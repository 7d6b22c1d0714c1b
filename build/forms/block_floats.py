"""Small floats with a scale for each block, as checkpoints store them, and back to numbers.

| format | element | block | scale |
| --- | --- | --- | --- |
| NVFP4 | e2m1, two in a byte | 16 inputs | e4m3, and one float32 for the whole tensor |
| MXFP4 | e2m1, two in a byte | 32 inputs | e8m0, a power of two |
| MXFP8 | e4m3 | 32 inputs | e8m0 |
| block FP8 | e4m3 | 128 outputs by 128 inputs | float32 |

Knows nothing of how scales are chosen (block_quantization.py), and no names of tensors.
Source: OCP Microscaling Formats (MX) 1.0, sections 5.1 to 5.4; nvidia-modelopt 0.47,
torch/quantization/qtensor; compressed-tensors 0.20, compressors/nvfp4; DeepSeek-V3's
inference/kernel.py (weight_dequant).
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 more is a minus
NVFP4_BLOCK = (1, 16)
MX_BLOCK = (1, 32)
FP8_BLOCK = (128, 128)
E8M0_BIAS = 127

Block = tuple[int, int]  # outputs, inputs


def round_e2m1(values: Tensor) -> Tensor:
    """`values`, floating, made those of e2m1 in place: to the nearest, ties to the even code,
    beyond +-6 saturated.
    """
    values.clamp_(-E2M1_MAX, E2M1_MAX)
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return values.div_(step).round_().mul_(step)


def pack_e2m1(values: Tensor) -> Tensor:
    """uint8 [..., n / 2] from values of e2m1, floating [..., n]: the even one in the low nibble."""
    known = torch.tensor(E2M1_VALUES, device=values.device)
    codes = torch.bucketize(values.float().abs(), known).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_e2m1(packed: Tensor) -> Tensor:
    """float32 [..., 2 * n] from uint8 [..., n], the inverse of `pack_e2m1`."""
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=packed.device)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return signed[codes.int()]


def from_e8m0(exponents: Tensor) -> Tensor:
    """float32 of uint8 or float8_e8m0fnu, a power of two each: 2 ** (byte - 127); NaN for 255."""
    return exponents.view(torch.uint8).view(torch.float8_e8m0fnu).float()


def to_e8m0(scale: Tensor) -> Tensor:
    """uint8 of the least power of two that is not below each scale, floating and positive."""
    fraction, exponent = torch.frexp(scale.float())  # scale = fraction * 2 ** exponent, from 1/2
    exponent = torch.where(fraction > 0.5, exponent, exponent - 1)
    return (exponent + E8M0_BIAS).clamp_(0, 254).to(torch.uint8)


def num_blocks(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Blocks along the outputs and the inputs; the last of each may be a part of one."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def spread_scale(scale: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """A scale for each element, float32 `shape`, from one for each block, as `num_blocks` counts
    them.
    """
    assert tuple(scale.shape) == num_blocks(shape, block), (scale.shape, shape, block)
    rows = scale.float().repeat_interleave(block[0], dim=0) if block[0] > 1 else scale.float()
    return rows[: shape[0]].repeat_interleave(block[1], dim=1)[:, : shape[1]]


def dequantize_blocks(
    q: Tensor, scale: Tensor, block: Block, second: Tensor | None = None
) -> Tensor:
    """float32 [out, in]: every element times its block's scale, and times `second`, float32 [] or
    [1], where there is one.

    q: uint8 [out, in / 2] of e2m1, or float8_e4m3fn [out, in]. scale: uint8 and float8_e8m0fnu are
    e8m0; other dtypes are numbers.
    """
    values = unpack_e2m1(q) if q.dtype == torch.uint8 else q.float()
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = from_e8m0(scale)
    scale = scale.float() if second is None else scale.float() * second.float()
    out_features, in_features = values.shape
    return values.mul_(spread_scale(scale, (out_features, in_features), block))

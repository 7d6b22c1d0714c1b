"""torch's own products over FP8 and packed 4-bit weights, on a CPU and on a GPU.

The two devices pack 4-bit weights differently; all else is the same. Chooses nothing
(`machine/device.py` says what a device can do) and knows no scales but those it is handed.
Source: PyTorch, aten/src/ATen/native/cuda/int4mm.cu, native/cpu/int4mm_kernel.cpp, cuda/Blas.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INT4_GROUPS = (32, 64, 128, 256)
_INT4_ROWS = {"cpu": 16, "cuda": 8}
_SCALED_MULTIPLE = 16


def fits_scaled(weight: Tensor) -> bool:
    """Whether a GPU's FP8 product takes a weight of this shape."""
    return all(size % _SCALED_MULTIPLE == 0 for size in weight.shape)


def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of float8_e4m3fn [tokens, in] and [out, in]: float32 [tokens, out].

    Scales are left to the caller, who has them in float32 too.
    """
    one = torch.ones((), dtype=torch.float32, device=x.device)
    y: Tensor = torch._scaled_mm(
        x.contiguous(), weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32
    )
    return y


def fits_int4(out_features: int, in_features: int, group_size: int, device: torch.device) -> bool:
    """Whether the device's packed 4-bit product takes this shape."""
    return (
        group_size in _INT4_GROUPS
        and in_features % group_size == 0
        and out_features % _INT4_ROWS[device.type] == 0
    )


def pack_for_product(q: Tensor) -> Tensor:
    """int8 [out, in] in [-8, 7], as the product on its device wants it; the kernel subtracts the
    8 again that is added here.
    """
    if q.device.type == "cpu":
        unsigned = (q.to(torch.int32) + 8).contiguous()
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        return packed
    pairs = pair_nibbles(q)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _inner_tiles(q.shape[1]))
    return packed


def pair_nibbles(q: Tensor) -> Tensor:
    """int8 [out, in] in [-8, 7] -> uint8 [out, in // 2] of q + 8: even columns are the high
    nibbles.
    """
    unsigned = (q + 8).view(torch.uint8)
    return (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()


def _inner_tiles(in_features: int) -> int:
    """How many tiles of 16 columns the GPU reads at once: as many as divide them, up to 8."""
    return next(tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0)


def int4_product(x: Tensor, packed: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """x: [tokens, in], on a GPU bfloat16; scale_and_zero: its dtype, [in // group_size, out, 2]."""
    aten = torch.ops.aten
    on_cpu = x.device.type == "cpu"
    product = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm
    y: Tensor = product(x, packed, group_size, scale_and_zero)
    return y

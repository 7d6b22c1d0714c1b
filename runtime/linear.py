"""Matrix products on a CPU over the weights a checkpoint holds: dense, FP8, INT4 groups.

Each class keeps one form of weight in memory and is called with x: [tokens, in_features].
Knows nothing of layers or names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.packing import dequantize_int4, to_fp8, unpack_int4

# Group sizes and row multiples of torch's packed 4-bit product on a CPU.
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_ROWS = 16


class Linear(Protocol):
    """y = x @ weight.T + bias; x: [tokens, in_features], y: [tokens, out_features], same dtype."""

    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """Weights in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Fp8Linear:
    """Static per-tensor FP8: x is rounded to e4m3 too, as the GPU's FP8 product does.

    Both factors are e4m3 values held exactly in the compute dtype, so the product has the
    GPU's rounding; the two scales are applied to the result.
    weight: float8_e4m3fn [out, in]; weight_scale, activation_scale: float32 [1], multipliers.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        activation_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = weight.shape[0]
        self.inverse_activation_scale = 1.0 / float(activation_scale)
        self.output_scale = float(activation_scale) * float(weight_scale)

    def __call__(self, x: Tensor) -> Tensor:
        quantized = to_fp8(x.float() * self.inverse_activation_scale).to(x.dtype)
        y = functional.linear(quantized, self.weight) * self.output_scale
        return y if self.bias is None else y + self.bias


class Int4Linear:
    """Symmetric INT4 groups through torch's packed 4-bit product (weight-only: x is not rounded).

    q: int8 [out, in] in [-8, 7]; scale: floating [out, in // group_size].
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features = q.shape[0]
        self.group_size = q.shape[1] // scale.shape[1]
        self.bias = None if bias is None else bias.to(dtype)
        unsigned = (q.to(torch.int32) + 8).contiguous()  # the kernel subtracts 8 again
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        scale = scale.to(dtype).T  # [groups, out]
        self.scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    @staticmethod
    def fits(out_features: int, in_features: int, group_size: int) -> bool:
        """Whether the packed product takes this shape."""
        return (
            group_size in _INT4_GROUPS
            and in_features % group_size == 0
            and out_features % _INT4_ROWS == 0
        )

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scale_and_zero
        )
        return y if self.bias is None else y + self.bias


def make_linear(modules: Sequence[dict[str, Tensor]], dtype: torch.dtype) -> Linear:
    """One product over the rows of all `modules`, from their checkpoint tensors.

    modules: each {"weight": ..., "bias": ..., "weights_scaling_factor": ..., ...}, merged over
    ranks, equal in form; fc and gate are given together and run as one product.
    """
    first = modules[0]
    bias = torch.cat([m["bias"] for m in modules]) if "bias" in first else None
    if first["weight"].dtype == torch.float8_e4m3fn:
        raw = [m["weight"].view(torch.uint8) for m in modules]
        weight = torch.cat(raw).view(torch.float8_e4m3fn)
        scale, activation = first["weights_scaling_factor"], first["activation_scaling_factor"]
        return Fp8Linear(weight, scale, activation, bias, dtype)
    if first["weight"].dtype == torch.int8:
        packed = torch.cat([m["weight"] for m in modules])
        scale = torch.cat([m["weights_scaling_factor"] for m in modules])
        out_features, in_features = packed.shape[0] * 2, packed.shape[1]
        if Int4Linear.fits(out_features, in_features, in_features // scale.shape[1]):
            return Int4Linear(unpack_int4(packed), scale, bias, dtype)
        return DenseLinear(dequantize_int4(packed, scale), bias, dtype)
    return DenseLinear(torch.cat([m["weight"] for m in modules]), bias, dtype)

"""Matrix products on a CPU over the weights a checkpoint holds: dense, FP8, INT8, INT4 groups.

Each class keeps one form of weight in memory and is called with x: [tokens, in_features].
Knows nothing of layers or names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.packing import FP8_MAX, dequantize_int4, to_fp8, unpack_int4

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
    """INT4 groups through torch's packed 4-bit product (weight-only: x is not rounded).

    q: int8 [out, in] in [-8, 7]; scale: floating [out, in // group_size]; zero: what is added
    to q * scale, [in // group_size, out].
    """

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        zero: Tensor | None = None,
    ) -> None:
        self.out_features = q.shape[0]
        self.group_size = q.shape[1] // scale.shape[1]
        self.bias = None if bias is None else bias.to(dtype)
        unsigned = (q.to(torch.int32) + 8).contiguous()  # the kernel subtracts 8 again
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        scale = scale.to(dtype).T  # [groups, out]
        added = torch.zeros_like(scale) if zero is None else zero.to(dtype)
        self.scale_and_zero = torch.stack([scale, added], dim=-1).contiguous()

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


class Fp8RowwiseLinear:
    """FP8 with a scale for each output channel, and one for each token taken from x itself.

    weight: float8_e4m3fn [out, in]; scale: float32 [out], multipliers.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.weight = weight.to(dtype)
        self.scale = scale.float()
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        token_scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / FP8_MAX
        quantized = to_fp8(x.float() / token_scale).to(x.dtype)
        y = functional.linear(quantized, self.weight).float() * token_scale * self.scale
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Linear:
    """Weight-only INT8: one scale per output channel, and per rank where the inputs were cut.

    q: int8 [out, in]; scale: floating [out], or [out, ranks] for a cut along the inputs: each
    rank's partial product has its own, and the all-reduce adds them up.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        scale = scale.to(dtype)
        ranks = scale.view(len(scale), -1).unbind(1)
        self.parts = [
            (part.contiguous(), rank.contiguous())
            for part, rank in zip(q.chunk(len(ranks), dim=1), ranks, strict=True)
        ]
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = q.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        for (q, scale), part in zip(self.parts, x.chunk(len(self.parts), dim=-1), strict=True):
            product: Tensor = torch.ops.aten._weight_int8pack_mm(part.contiguous(), q, scale)
            y = product if y is None else y + product
        assert y is not None
        return y if self.bias is None else y + self.bias


class PrequantLinear:
    """AWQ: x is multiplied by a factor for each channel, by which the weight was divided.

    fp8: x is rounded to e4m3 after that, as under W4A8; the factor holds the scale already.
    """

    def __init__(self, inner: Linear, factor: Tensor, dtype: torch.dtype, fp8: bool) -> None:
        self.inner = inner
        self.factor = factor.to(dtype)
        self.fp8 = fp8
        self.out_features = inner.out_features

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.factor
        return self.inner(to_fp8(x.float()).to(x.dtype) if self.fp8 else x)


class ScaledLinear:
    """Another linear's product times one number, and then the bias."""

    def __init__(
        self, inner: Linear, alpha: float, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.inner = inner
        self.alpha = alpha
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = inner.out_features

    def __call__(self, x: Tensor) -> Tensor:
        y = self.inner(x) * self.alpha
        return y if self.bias is None else y + self.bias


class JoinedLinear:
    """Linears that share x but not their input scales, run one by one."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts
        self.out_features = sum(part.out_features for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


# One for each input channel or the whole input: modules run as one product only when equal.
_INPUT_SCALES = (
    "activation_scaling_factor",
    "prequant_scaling_factor",
    "weights_scaling_factor_2",
)


def make_linear(modules: Sequence[dict[str, Tensor]], dtype: torch.dtype) -> Linear:
    """One product over the rows of all `modules`, from their checkpoint tensors.

    modules: each {"weight": ..., "bias": ..., "weights_scaling_factor": ..., ...}, merged over
    ranks, equal in form; fc and gate are given together and run as one product.
    """
    first = modules[0]
    if not all(_joinable(first, module) for module in modules[1:]):
        return JoinedLinear([make_linear([module], dtype) for module in modules])
    bias = torch.cat([m["bias"] for m in modules]) if "bias" in first else None
    weight = _stacked(modules, "weight")
    if weight.dtype == torch.float8_e4m3fn:
        if "per_channel_scale" in first:
            return Fp8RowwiseLinear(weight, _stacked(modules, "per_channel_scale"), bias, dtype)
        scale, activation = first["weights_scaling_factor"], first["activation_scaling_factor"]
        return Fp8Linear(weight, scale, activation, bias, dtype)
    if weight.dtype != torch.int8:
        return DenseLinear(weight, bias, dtype)
    if "per_channel_scale" in first:
        return Int8Linear(weight, _stacked(modules, "per_channel_scale"), bias, dtype)
    scale = _stacked(modules, "weights_scaling_factor")
    if "weights_scaling_factor_2" in first:
        return _w4a8_linear(first, weight, scale, bias, dtype)
    zero = torch.cat([m["zero"] for m in modules], dim=1) if "zero" in first else None
    linear = _int4_linear(weight, scale, zero, bias, dtype)
    if "prequant_scaling_factor" in first:
        return PrequantLinear(linear, first["prequant_scaling_factor"], dtype, fp8=False)
    return linear


def _stacked(modules: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """A tensor of all modules, along dim 0; float8 has no concatenation of its own."""
    parts = [module[name] for module in modules]
    if parts[0].dtype == torch.float8_e4m3fn:
        return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return torch.cat(parts)


def _joinable(first: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two modules can run as one: the same form, and equal scales on their input."""
    if first.keys() != other.keys() or first["weight"].dtype != other["weight"].dtype:
        return False
    names = list(_INPUT_SCALES)
    if first["weight"].dtype == torch.float8_e4m3fn and "per_channel_scale" not in first:
        names.append("weights_scaling_factor")  # one for the whole weight
    return all(torch.equal(first[name], other[name]) for name in names if name in first)


def _int4_linear(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Linear:
    out_features, in_features = packed.shape[0] * 2, packed.shape[1]
    if Int4Linear.fits(out_features, in_features, in_features // scale.shape[1]):
        return Int4Linear(unpack_int4(packed), scale, bias, dtype, zero)
    return DenseLinear(dequantize_int4(packed, scale, zero), bias, dtype)


def _w4a8_linear(
    module: dict[str, Tensor],
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Linear:
    """W4A8 in the loader's arithmetic: the groups' scales are divided by the second one and kept
    in float16, the input factors by the activation scale, and alpha gives both back at the end.
    """
    second, activation = module["weights_scaling_factor_2"], module["activation_scaling_factor"]
    prequant = module["prequant_scaling_factor"]
    inner = _int4_linear(packed, (scale.float() / second).half(), None, None, dtype)
    factor = (prequant.float() / activation).to(prequant.dtype)
    scaled = ScaledLinear(inner, float(activation) * float(second), bias, dtype)
    return PrequantLinear(scaled, factor, dtype, fp8=True)

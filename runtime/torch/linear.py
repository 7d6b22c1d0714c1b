"""Matrix products over the weights a checkpoint holds: dense, FP8, INT8, INT4 groups.

Each class keeps one form of weight in memory, on the device its tensors came on, and is called
with x: [tokens, in_features]. Knows nothing of layers or names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.packing import FP8_MAX, dequantize_int4, to_fp8, unpack_int4
from enginehouse.runtime.machine.device import native_products
from enginehouse.runtime.torch.packed_products import (
    fits_int4,
    fits_scaled,
    int4_product,
    pack_for_product,
    scaled_product,
)

# From here on a packed INT8 product takes longer than converting the weights and a dense one.
_MANY_TOKENS = 32


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

    Without an FP8 product both factors are e4m3 values held exactly in the compute dtype, so the
    product has the GPU's rounding; the two scales are applied to the result.
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
        self.weight = _fp8_factor(weight, dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = weight.shape[0]
        self.inverse_activation_scale = 1.0 / float(activation_scale)
        self.output_scale = float(activation_scale) * float(weight_scale)

    def __call__(self, x: Tensor) -> Tensor:
        quantized = to_fp8(x.float() * self.inverse_activation_scale)
        y = _fp8_product(quantized, self.weight, x.dtype) * self.output_scale
        y = y.to(x.dtype)
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
        self.packed = pack_for_product(q)
        scale = scale.to(dtype).T  # [groups, out]
        added = torch.zeros_like(scale) if zero is None else zero.to(dtype)
        self.scale_and_zero = torch.stack([scale, added], dim=-1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y = int4_product(x.contiguous(), self.packed, self.group_size, self.scale_and_zero)
        return y if self.bias is None else y + self.bias


class Fp8RowwiseLinear:
    """FP8 with a scale for each output channel, and one for each token taken from x itself.

    weight: float8_e4m3fn [out, in]; scale: float32 [out], multipliers.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.weight = _fp8_factor(weight, dtype)
        self.scale = scale.float()
        self.bias = None if bias is None else bias.to(dtype)
        self.out_features = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        token_scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / FP8_MAX
        quantized = to_fp8(x.float() / token_scale)
        y = _fp8_product(quantized, self.weight, x.dtype).float() * token_scale * self.scale
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


def _fp8_factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float8 weights as they are where the device multiplies them, else in the compute dtype."""
    native = native_products(weight.device, dtype).fp8 and fits_scaled(weight)
    return weight.contiguous() if native else weight.to(dtype)


def _fp8_product(quantized: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T of float8 x and what `_fp8_factor` made; float32 from a product in float8."""
    if weight.dtype == torch.float8_e4m3fn:
        return scaled_product(quantized, weight)
    return functional.linear(quantized.to(dtype), weight)


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
            product = _int8_product(part.contiguous(), q, scale)
            y = product if y is None else y + product
        assert y is not None
        return y if self.bias is None else y + self.bias


def _int8_product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """torch's packed product has no blocks of tokens: for many, the weights are converted first,
    which is exact.
    """
    if len(x) >= _MANY_TOKENS:
        return functional.linear(x, q.to(x.dtype)) * scale
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x, q, scale)
    return product


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
        return _int8_linear(weight, _stacked(modules, "per_channel_scale"), bias, dtype)
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
    group_size, native = in_features // scale.shape[1], native_products(packed.device, dtype).int4
    if native and fits_int4(out_features, in_features, group_size, packed.device):
        return Int4Linear(unpack_int4(packed), scale, bias, dtype, zero)
    return DenseLinear(dequantize_int4(packed, scale, zero), bias, dtype)


def _int8_linear(q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    if native_products(q.device, dtype).int8:
        return Int8Linear(q, scale, bias, dtype)
    scale = scale.float().view(len(q), -1)  # [out, ranks]
    whole = q.float().view(*scale.shape, -1) * scale.unsqueeze(-1)
    return DenseLinear(whole.flatten(1), bias, dtype)


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

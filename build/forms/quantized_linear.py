"""One linear that a checkpoint holds quantised: its value, and what an engine holds for it.

Whatever the format it was read from, integers and scales stay as they are: nothing here rounds a
weight. This file knows no file, no name and no packing but the engine's.
Source: TensorRT-LLM 1.2.1 checkpoint format, FP8, FP8_PER_CHANNEL_PER_TOKEN, W4A16_AWQ, W4A8_AWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.runtime.checkpoint.packing import pack_int4
from enginehouse.runtime.config import QuantConfig
from enginehouse.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class QuantizedForm:
    """The form an engine made of the checkpoint has; `quant` is its name in the settings.

    scale_dtype: torch's name of the INT4 scales' dtype, which the engine keeps; None for FP8.
    """

    quant: str
    quantization: QuantConfig
    scale_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """weight is about (q - zero) * scale * pre_quant_scale.

    q: int8 [out, in], of 4 bits in [-8, 7], or float8_e4m3fn [out, in].
    scale: [out, in / group] of 4 bits; [out] of 8; float32 [1] or [out] for float8.
    zero: int8 [out, in / group] in q's units, or None for zeros.
    pre_quant_scale: [in], what x is multiplied by first, or None for ones.
    activation_scale: float32 [1], the static multiplier of x rounded to float8, or None.
    second_scale: float32 [1], W4A8's: its kernel divides `scale` by it, and gives it back.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    activation_scale: Tensor | None = None
    second_scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        """float32 [out, in], the weight that the format defines."""
        if self.q.dtype == torch.float8_e4m3fn:
            return self.q.float() * self.scale.view(-1, 1)
        if self.scale.ndim == 1:
            return self.q.float() * self.scale.float().view(-1, 1)
        groups = self.q.float().view(*self.scale.shape, -1)  # [out, groups, g]
        if self.zero is not None:
            groups = groups - self.zero.float().unsqueeze(-1)
        weight = (groups * self.scale.float().unsqueeze(-1)).flatten(1)
        return weight if self.pre_quant_scale is None else weight * self.pre_quant_scale.float()


def join_linears(
    names: Sequence[str],
    linears: Sequence[QuantizedLinear],
    quantization: QuantConfig,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None,
    in_order: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """The engine's tensors of one fused linear, whole: {"weight": ..., "zero": ..., ...}.

    linears: q, k, v in this order, or a single one. dtype: the model's, of pre-quant scales and
    zeros; the product of a zero and a scale is rounded to it once, as the format wants. in_order:
    what has a row for each output, joined, with its rows as the engine has them.

    Raises CheckpointError when the linears share an input but not its factors.
    """
    if quantization.quant_algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return _join_fp8(linears, quantization, in_order)
    assert scale_dtype is not None
    scale = in_order(torch.cat([linear.scale for linear in linears]))
    if quantization.quant_algo == "W8A16":
        weight = in_order(torch.cat([linear.q for linear in linears]))
        return {"weight": weight, "per_channel_scale": scale.to(scale_dtype)}
    if not torch.equal(scale.to(scale_dtype).to(scale.dtype), scale):
        raise CheckpointError(
            f"{names[0]} has scales that are no values of {scale_dtype}, of which its checkpoint "
            "says that they are: download its files again"
        )
    tensors = {
        "weight": pack_int4(in_order(torch.cat([linear.q for linear in linears]))),
        "weights_scaling_factor": scale.to(scale_dtype),
    }
    if quantization.has_zero_point:
        zeros = [_zero(linear) for linear in linears]
        tensors["zero"] = in_order(torch.cat(zeros)).to(dtype).T.contiguous()  # [groups, out]
    if quantization.pre_quant_scale:
        factors = [_pre_quant_scale(linear) for linear in linears]
        for name, factor in zip(names, factors, strict=True):
            if not torch.equal(factor, factors[0]):
                raise CheckpointError(
                    f"{name} and {names[0]} have different pre_quant_scale, but the engine runs "
                    "them on one input; quantise again with one factor for q, k and v"
                )
        tensors["prequant_scaling_factor"] = factors[0].to(dtype)
    if quantization.quant_algo == "W4A8_AWQ":
        for name, found in (
            ("weights_scaling_factor_2", [linear.second_scale for linear in linears]),
            ("activation_scaling_factor", [linear.activation_scale for linear in linears]),
        ):
            known = [scale for scale in found if scale is not None]
            assert len(known) == len(linears), "checked when the checkpoint was opened"
            tensors[name] = torch.stack(known).amax(dim=0)
    return tensors


def _join_fp8(
    linears: Sequence[QuantizedLinear],
    quantization: QuantConfig,
    in_order: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    raw = in_order(torch.cat([linear.q.view(torch.uint8) for linear in linears]))
    tensors = {"weight": raw.view(torch.float8_e4m3fn)}
    if quantization.quant_algo == "FP8":
        scales = {float(linear.scale) for linear in linears}
        assert len(scales) == 1, "the form was chosen for equal scales"
        activations = [linear.activation_scale for linear in linears]
        known = [scale for scale in activations if scale is not None]
        assert len(known) == len(linears), "the form was chosen for static activations"
        tensors["weights_scaling_factor"] = linears[0].scale
        tensors["activation_scaling_factor"] = torch.stack(known).amax(dim=0)
    else:
        rows = [linear.scale.expand(len(linear.q)) for linear in linears]
        tensors["per_channel_scale"] = in_order(torch.cat(rows))
    return tensors


def stack_experts(experts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """FP8 experts as one linear: weight [experts, out, in], weights_scaling_factor [experts, 1].

    What enters them has one scale for all, the largest: activation_scaling_factor [1].
    """
    raw = torch.stack([expert["weight"].view(torch.uint8) for expert in experts])
    activations = torch.stack([expert["activation_scaling_factor"] for expert in experts])
    return {
        "weight": raw.view(torch.float8_e4m3fn),
        "weights_scaling_factor": torch.stack([e["weights_scaling_factor"] for e in experts]),
        "activation_scaling_factor": activations.amax(dim=0),
    }


def _zero(linear: QuantizedLinear) -> Tensor:
    """What the engine adds after the scale: float32 [out, groups]."""
    if linear.zero is None:
        return torch.zeros(linear.scale.shape)
    return -linear.zero.float() * linear.scale.float()


def _pre_quant_scale(linear: QuantizedLinear) -> Tensor:
    if linear.pre_quant_scale is None:
        return torch.ones(linear.q.shape[1])
    return linear.pre_quant_scale.float()

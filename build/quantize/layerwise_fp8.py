"""FP8 as the calibration text goes through the model: weights that make up for what was rounded.

Weights are rounded so that a linear's columns make up for each other, and in part for what the
layers before lost, on inputs rounded to FP8 as they will be; a layer's experts, which see few of
them, to the nearest.
Source: GPTQ (Frantar et al., 2023), section 3, on the e4m3 grid; GPTAQ (Li et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.build.forms.quantization import fp8_scale, quantize_fp8
from enginehouse.build.quantize.compensation import (
    InputMoments,
    aim_at_truth,
    round_compensated,
    rounding_order,
)
from enginehouse.build.quantize.layerwise import Inputs, LayerwiseWalk, stacked
from enginehouse.runtime.checkpoint.packing import to_fp8

# Added to each channel's own second moment, as a share of it: calibration has few tokens, and what
# it says of correlations holds for other text only in part.
DAMPING = 0.1
# Of what the layers before lost, what a linear makes up for; more fits the calibration text alone.
_MADE_UP = 0.5


class LayerwiseFp8(LayerwiseWalk):
    """The walk for FP8: one scale for the weights, [1], and one for what enters them."""

    def _entering(self, x: Tensor, largest: float) -> Tensor:
        scale = fp8_scale(largest)
        return to_fp8(x / scale).float() * scale

    def _settle(
        self, modules: Sequence[str], weights: Sequence[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        if inputs.moments is None:
            scale, whole = _quantize_experts(stacked(weights), self.one_scale)
        else:
            weight = aim_at_truth(stacked(weights), inputs.moments, _MADE_UP)
            scale = torch.tensor([fp8_scale(float(weight.abs().amax()))])
            whole = quantize_fp8_compensated(weight, scale, inputs.moments)
        entering = torch.tensor([fp8_scale(float(inputs.largest.amax()))])
        stored: dict[str, Tensor] = {}
        parts = whole.split([len(weight) for weight in weights])
        for module, part in zip(modules, parts, strict=True):
            stored[f"{module}.weight"] = part
            stored[f"{module}.weights_scaling_factor"] = scale
            stored[f"{module}.activation_scaling_factor"] = entering
        factor = scale.to(whole.device).view(-1, *[1] * (whole.ndim - 1))
        stored = {name: self.padding.pad(name, tensor) for name, tensor in stored.items()}
        return stored, [part.float() * factor for part in parts]


def _quantize_experts(experts: Tensor, one_scale: bool) -> tuple[Tensor, Tensor]:
    """A scale for each, float32 [experts, 1], and float8_e4m3fn [experts, out, in]. An expert that
    calibration never chose shares the inputs' scale of those it did.
    """
    peaks = [float(expert.abs().amax()) for expert in experts]
    scale = torch.tensor([[fp8_scale(max(peaks) if one_scale else peak)] for peak in peaks])
    pairs = zip(experts, scale.flatten().tolist(), strict=True)
    return scale, torch.stack([quantize_fp8(expert, its_own) for expert, its_own in pairs])


def quantize_fp8_compensated(weight: Tensor, scale: Tensor, moments: InputMoments) -> Tensor:
    """float8_e4m3fn [out, in]; weight is about q * scale, with the least error of the outputs that
    rounding column by column finds.

    weight: float32 [out, in]; scale: float32 [1]; moments: of the linear's inputs, whose second is
    taken. Memory: two matrices [in, in] at most, and three copies of weight.
    """
    order, upper = rounding_order(moments, DAMPING)
    steps = scale.to(weight.device).expand(1, weight.shape[1])
    return to_fp8(round_compensated(weight, steps, order, upper, lambda x: x.copy_(to_fp8(x))))

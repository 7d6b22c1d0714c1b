"""NVFP4 as the calibration text goes through the model: weights that make up for what was rounded.

Of W4A4 what enters a linear is rounded as its kernel will; of W4A16 nothing is. Block scales are
chosen first and stand fixed while the columns make up for each other; a layer's experts, which see
few tokens, are rounded to the nearest.
Source: GPTQ (Frantar et al., 2023), section 3, on the e2m1 grid; GPTAQ (Li et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.build.forms.block_floats import (
    NVFP4_BLOCK,
    dequantize_blocks,
    pack_e2m1,
    round_e2m1,
    spread_scale,
)
from enginehouse.build.forms.block_quantization import (
    nvfp4_round_trip,
    nvfp4_scales,
    nvfp4_second_scale,
    quantize_nvfp4,
)
from enginehouse.build.quantize.compensation import aim_at_truth, round_compensated, rounding_order
from enginehouse.build.quantize.layerwise import Inputs, LayerwiseWalk, stacked
from enginehouse.build.quantize.layerwise_fp8 import LayerwiseFp8

# As FP8's (layerwise_fp8.py): of each channel's own second moment, and of what earlier layers lost.
DAMPING = 0.1
_MADE_UP = 0.5


class LayerwiseNvfp4(LayerwiseWalk):
    """The walk for NVFP4 and W4A16_NVFP4."""

    @property
    def _rounds_inputs(self) -> bool:
        return self.form.quant_algo == "NVFP4"

    def _entering(self, x: Tensor, largest: float) -> Tensor:
        return nvfp4_round_trip(x, nvfp4_second_scale(largest)) if self._rounds_inputs else x

    def _settle(
        self, modules: Sequence[str], weights: Sequence[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        if inputs.moments is None:
            return self._settle_experts(modules[0], weights[0], inputs.largest)
        weight = aim_at_truth(stacked(weights), inputs.moments, _MADE_UP)
        second = nvfp4_second_scale(float(weight.abs().amax()))
        scale = nvfp4_scales(weight, second)
        steps = spread_scale(scale.float().mul_(second), (*weight.shape,), NVFP4_BLOCK)
        steps = steps.to(weight.device)
        order, upper = rounding_order(inputs.moments, DAMPING)
        values = round_compensated(weight, steps, order, upper, round_e2m1)
        rows = [len(weight) for weight in weights]
        entering = torch.tensor([nvfp4_second_scale(float(inputs.largest.amax()))])
        stored: dict[str, Tensor] = {}
        parts = zip(modules, values.split(rows), scale.split(rows), strict=True)
        for module, part, its_scale in parts:
            stored[f"{module}.weight"] = pack_e2m1(part)
            stored[f"{module}.weights_scaling_factor"] = its_scale
            stored[f"{module}.weights_scaling_factor_2"] = torch.tensor([second])
            if self._rounds_inputs:
                stored[f"{module}.activation_scaling_factor"] = entering
        return stored, values.mul_(steps).split(rows)

    def _settle_experts(
        self, module: str, experts: Tensor, largest: Tensor
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Scales of tensors and of inputs for each expert, [experts, 1]; gate and up, which are one
        here, share them. What enters an expert that saw no token is scaled as the layer's largest.
        """
        second = nvfp4_second_scale(float(experts.abs().amax())) if self.one_scale else None
        made = [quantize_nvfp4(expert.cpu(), second) for expert in experts]
        q, scale, seconds = (torch.stack(list(parts)) for parts in zip(*made, strict=True))
        stored = {
            f"{module}.weight": q,
            f"{module}.weights_scaling_factor": scale,
            f"{module}.weights_scaling_factor_2": seconds,
        }
        if self._rounds_inputs:
            peaks = largest.amax(1).cpu()
            seen = (peaks > 0) & (not self.one_scale)
            self.unseen += 0 if self.one_scale or module != "mlp.fc" else int((~seen).sum())
            peaks = torch.where(seen, peaks, peaks.max())
            entering = [[nvfp4_second_scale(peak)] for peak in peaks.tolist()]
            stored[f"{module}.activation_scaling_factor"] = torch.tensor(entering)
        meant = [dequantize_blocks(one.q, one.scale, NVFP4_BLOCK, one.second) for one in made]
        return stored, [torch.stack(meant).to(experts.device)]


class LayerwiseMixed(LayerwiseNvfp4, LayerwiseFp8):
    """The walk for MIXED_PRECISION of these: each group of linears in its own form."""

    @property
    def _kind(self) -> type[LayerwiseNvfp4] | type[LayerwiseFp8]:
        return LayerwiseFp8 if self.form.quant_algo == "FP8" else LayerwiseNvfp4

    def _entering(self, x: Tensor, largest: float) -> Tensor:
        return self._kind._entering(self, x, largest)

    def _settle(
        self, modules: Sequence[str], weights: Sequence[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        return self._kind._settle(self, modules, weights, inputs)

"""AWQ as the calibration text goes through the model: INT4 linears, with FP8 inputs in W4A8.

Source: AWQ (Lin et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.build.forms.quantization import Int4Weight, fp8_scale
from enginehouse.build.quantize.awq import AwqLinear, quantize_awq
from enginehouse.build.quantize.layerwise import Inputs, LayerwiseWalk, stacked
from enginehouse.runtime.checkpoint.packing import pack_int4


class LayerwiseAwq(LayerwiseWalk):
    """The walk for W4A16_AWQ with input scales and W4A8_AWQ, neither of which experts have."""

    def _settle(
        self, modules: Sequence[str], weights: Sequence[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        assert inputs.moments is not None
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        group_size = self.config.quantization.group_size
        linear = quantize_awq(stacked(weights), inputs.moments, group_size, dtype)
        rows = [len(weight) for weight in weights]
        return self._stored(modules, linear, rows, inputs), linear.dequantized().split(rows)

    def _stored(
        self, modules: Sequence[str], linear: AwqLinear, rows: list[int], inputs: Inputs
    ) -> dict[str, Tensor]:
        """A row range of the linear for each module. W4A8's two scales are one for them all."""
        q, scale = linear.weight
        extra = {"prequant_scaling_factor": linear.prequant}
        if self.config.quantization.quant_algo == "W4A8_AWQ":
            weight = Int4Weight(q, scale)
            largest = float((weight.q.view(*scale.shape, -1).abs().amax(-1) * scale).amax())
            entering = float((inputs.largest * linear.prequant.float()).amax())
            extra["weights_scaling_factor_2"] = torch.tensor([fp8_scale(largest)])
            extra["activation_scaling_factor"] = torch.tensor([fp8_scale(entering)])
        result: dict[str, Tensor] = {}
        parts = zip(modules, q.split(rows), scale.split(rows), strict=True)
        for module, part, part_scale in parts:
            result[f"{module}.weight"] = pack_int4(part)
            result[f"{module}.weights_scaling_factor"] = part_scale
            for name, tensor in extra.items():
                result[f"{module}.{name}"] = tensor
        return result

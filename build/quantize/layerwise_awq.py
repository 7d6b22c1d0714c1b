"""AWQ as the calibration text goes through the model: INT4 linears, with FP8 inputs in W4A8.

Source: AWQ (Lin et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from enginehouse.build.forms.quantization import Int4Weight, fp8_scale
from enginehouse.build.quantize.awq import AwqLinear, quantize_awq
from enginehouse.build.quantize.compensation import spread
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
        weight, columns = stacked(weights), replace(self.padding, rows={})
        order = columns.columns.get(modules[0].rpartition(".")[2])
        if order is not None:  # groups lie in the inputs as they are padded
            weight = columns.pad(f"{modules[0]}.weight", weight)
            inputs = Inputs(inputs.moments.spread(order.now), spread(inputs.largest, order.now))
        assert inputs.moments is not None
        linear = quantize_awq(weight, inputs.moments, group_size, dtype)
        rows = [len(weight) for weight in weights]
        meant = columns.unpad(f"{modules[0]}.weight", linear.dequantized())
        return self._stored(modules, linear, rows, inputs), meant.split(rows)

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
        padding = replace(self.padding, columns={})
        parts = zip(modules, q.split(rows), scale.split(rows), strict=True)
        for module, part, part_scale in parts:
            names = f"{module}.weight", f"{module}.weights_scaling_factor"
            result[names[0]] = pack_int4(padding.pad(names[0], part))
            result[names[1]] = padding.pad(names[1], part_scale)
            for name, tensor in extra.items():
                result[f"{module}.{name}"] = tensor
        return result

"""FP8 weights with scales of any reach: of a tensor, of each row, of blocks of rows and columns.

weight = q * scale. Scales are multipliers whatever they are called (`weight_scale_inv` too).
Source: DeepSeek-V3 (`weight_block_size`); transformers' FineGrainedFP8Config; compressed-tensors
(strategies tensor, channel, group and block); ModelOpt; AutoFP8; FBGEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import Shape, check_shape, found, matrix, read_scale
from enginehouse.build.forms.block_floats import num_blocks, spread_scale
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.source import TensorSource


@dataclass(frozen=True, slots=True)
class Fp8Form:
    """weight float8_e4m3fn [out, in]; weight_scale of one number, [out], [out, 1], or, with a
    block, [ceil(out / rows), ceil(in / columns)], ModelOpt's [.., 1, .., 1]. Scales of activations
    change no weight.
    """

    block: tuple[int, int] | None = None
    name: str = "FP8"
    marker: str = ".weight_scale"
    endings: tuple[str, ...] = (".weight", ".weight_scale", ".input_scale", ".input_scale_ub")
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        out_features, in_features = matrix(
            infos, f"{module}.weight", self.name, torch.float8_e4m3fn
        )
        name = f"{module}.weight_scale"
        found(infos, name, self.name)
        shapes: tuple[Shape, ...] = ((), (1,), (1, 1), (out_features,), (out_features, 1))
        if self.block is not None:
            rows, columns = num_blocks((out_features, in_features), self.block)
            shapes = ((rows, columns), (rows, 1, columns, 1))
        check_shape(infos, name, *shapes)
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        shape = self.shape(source, module)
        q = source.read(f"{module}.weight")
        check_finite(f"{module}.weight", q)
        scale = read_scale(source, f"{module}.weight_scale")
        if self.block is not None:
            scale = scale.view(num_blocks(shape, self.block))
            rows, columns = map(min, self.block, shape)
            return q.float().mul_(spread_scale(scale, shape, (rows, columns)))
        return q.float().mul_(scale.view(-1, 1))

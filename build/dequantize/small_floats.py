"""Floats of 4 or 8 bits with a scale for each block of inputs: NVFP4, MXFP4, MXFP8.

weight = q * scale, and for NVFP4 times (ModelOpt) or divided by (compressed-tensors) a number of
the whole tensor; ModelOpt's AWQ multiplies x first.
Source: modelopt 0.47, torch/quantization/qtensor; compressed-tensors 0.20, compressors/nvfp4, mxfp4
and mxfp8; transformers' integrations/mxfp4.py and OpenAI's gpt-oss (`*_blocks`, `*_scales`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import Shape, check_shape, found, matrix, read_scale
from enginehouse.build.forms.block_floats import dequantize_blocks, from_e8m0, unpack_e2m1
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.source import TensorSource

_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class SmallFloatForm:
    """One weight: uint8 [out, in / 2] of e2m1, the even input in the low nibble, or float8_e4m3fn
    [out, in]; weight_scale [out, in / group_size], float8_e4m3fn in NVFP4, else e8m0.

    stored: the ending of the weight's own tensor. whole: of NVFP4's number for the whole, a
    multiplier, or a divisor where divides is true. pre_quant_scale: [in].
    """

    name: str
    group_size: int
    stored: str = ".weight"
    whole: str | None = None
    divides: bool = False
    in_bytes: bool = False
    marker: str = ".weight_scale"
    endings: tuple[str, ...] = (
        ".weight",
        ".weight_packed",
        ".weight_scale",
        ".weight_scale_2",
        ".weight_global_scale",
        ".input_scale",
        ".input_global_scale",
        ".pre_quant_scale",
    )
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        dtype = torch.float8_e4m3fn if self.in_bytes else torch.uint8
        out_features, width = matrix(infos, module + self.stored, self.name, dtype)
        in_features = width if self.in_bytes else 2 * width
        scales = (torch.float8_e4m3fn,) if self.whole else _E8M0
        found(infos, f"{module}.weight_scale", self.name, *scales)
        groups = -(-in_features // self.group_size)
        check_shape(infos, f"{module}.weight_scale", (out_features, groups))
        if self.whole:
            found(infos, module + self.whole, self.name)
            check_shape(infos, module + self.whole, (), (1,))
        check_shape(infos, f"{module}.pre_quant_scale", (in_features,))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        _, in_features = self.shape(source, module)
        q = source.read(module + self.stored)
        check_finite(module + self.stored, q)
        stored = source.read(f"{module}.weight_scale")
        scale = stored.float() if self.whole else from_e8m0(stored)
        if self.whole:
            number = read_scale(source, module + self.whole)
            scale = scale / number if self.divides else scale * number
        check_finite(f"{module}.weight_scale", scale)
        weight = dequantize_blocks(q, scale, (1, min(self.group_size, in_features)))
        factor = f"{module}.pre_quant_scale"
        return weight.mul_(read_scale(source, factor)) if factor in source.infos else weight


@dataclass(frozen=True, slots=True)
class StackedMxfp4Form:
    """GPT-OSS's experts: NAME_blocks uint8 [experts, out, groups, 16] of e2m1, the even input in
    the low nibble; NAME_scales uint8 [experts, out, groups] of e8m0; NAME is [experts, in, out].
    """

    name: str = "MXFP4"
    marker: str = "_blocks"
    endings: tuple[str, ...] = ("_blocks", "_scales")
    weight: str = ""

    def shape(self, source: TensorSource, module: str) -> Shape:
        infos = source.infos
        shape = found(infos, f"{module}_blocks", self.name, torch.uint8)
        found(infos, f"{module}_scales", self.name, *_E8M0)
        check_shape(infos, f"{module}_blocks", (*shape[:3], 16))
        check_shape(infos, f"{module}_scales", shape[:3])
        experts, out_features, groups = shape[:3]
        return experts, groups * 32, out_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        shape = self.shape(source, module)
        scale = from_e8m0(source.read(f"{module}_scales"))
        check_finite(f"{module}_scales", scale)
        weight = torch.empty(shape)
        for expert, each in enumerate(source.read(f"{module}_blocks")):
            values = unpack_e2m1(each).mul_(scale[expert].unsqueeze(-1))  # [out, groups, 32]
            weight[expert] = values.flatten(1).T
        return weight

"""Integers in words of 32 bits, or in bytes: AutoAWQ, GPTQ, compressed-tensors, ModelOpt.

weight = (q - zero) * scale, one zero and one scale for a group of inputs.
Source: AutoAWQ (`WQLinear_GEMM`, `WQLinear_GEMV`); AutoGPTQ and GPTQModel (formats "gptq" and
"gptq_v2"); compressed-tensors (`pack_to_int32`, "int-quantized"); ModelOpt's unified export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import Shape, check_shape, found, matrix, read_scale
from enginehouse.build.forms.packed_words import AWQ_COLUMNS, WORD, check_symmetric, unpack
from enginehouse.build.source import TensorSource
from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.errors import CheckpointError


def _grouped(q: Tensor, zero: Tensor | int, scale: Tensor, group_of: Tensor | None) -> Tensor:
    """float32 [out, in] of unsigned q [out, in]; zero, scale [out, groups]; group_of int64 [in]."""
    weight = q.float()
    if group_of is not None:
        spread_zero = zero if isinstance(zero, int) else zero[:, group_of].float()
        return weight.sub_(spread_zero).mul_(scale[:, group_of])
    groups = weight.view(*scale.shape, -1)
    groups.sub_(zero if isinstance(zero, int) else zero.float().unsqueeze(-1))
    return groups.mul_(scale.unsqueeze(-1)).flatten(1)


def _num_groups(module: str, in_features: int, group_size: int) -> int:
    """How many there are; group_size -1 is one for all inputs."""
    size = in_features if group_size == -1 else group_size
    if size < 1 or in_features % size:
        raise CheckpointError(
            f"{module} has {in_features} inputs, which groups of {group_size} do not divide: do "
            "config.json and the weights belong together?"
        )
    return in_features // size


def _group_of(source: TensorSource, name: str, num_groups: int) -> Tensor | None:
    """int64 [in], the group of each input where a checkpoint says it (act-order), else None."""
    if name not in source.infos:
        return None
    index = source.read(name).long()
    if bool((index == -1).all()):  # compressed-tensors' word for none
        return None
    if not bool(((index >= 0) & (index < num_groups)).all()):
        raise CheckpointError(
            f"{name} names groups other than 0 to {num_groups - 1}, which the scales have: "
            "download the checkpoint again"
        )
    return index


@dataclass(frozen=True, slots=True)
class AwqForm:
    """AutoAWQ, 4 bits.

    "gemm": qweight int32 [in, out/8] with columns exchanged, qzeros [in/g, out/8], scales
    [in/g, out]. "gemv": qweight [out, in/8], qzeros [out, z], scales [out, 8z], both as wide as
    the kernel wants, of which the first in/g count.
    """

    group_size: int
    symmetric: bool
    gemv: bool = False
    name: str = "AutoAWQ"
    marker: str = ".qweight"
    endings: tuple[str, ...] = (".qweight", ".qzeros", ".scales")
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        first, packed = matrix(infos, f"{module}.qweight", self.name, torch.int32)
        out_features, in_features = (first, packed * 8) if self.gemv else (packed * 8, first)
        groups = _num_groups(module, in_features, self.group_size)
        scales = matrix(infos, f"{module}.scales", self.name)
        if self.symmetric and f"{module}.qzeros" not in infos:
            zeros = (0, 0)
        else:
            zeros = matrix(infos, f"{module}.qzeros", self.name, torch.int32)
        if not self.gemv:
            check_shape(infos, f"{module}.scales", (groups, out_features))
            check_shape(infos, f"{module}.qzeros", (groups, out_features // 8))
        else:
            padded = max(scales[-1], groups, zeros[-1] * 8)
            check_shape(infos, f"{module}.scales", (out_features, padded))
            check_shape(infos, f"{module}.qzeros", (out_features, padded // 8))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        _, in_features = self.shape(source, module)
        groups = _num_groups(module, in_features, self.group_size)
        q = self._values(source.read(f"{module}.qweight"))
        scale = read_scale(source, f"{module}.scales")
        scale = (scale[:, :groups] if self.gemv else scale.T).contiguous()
        if f"{module}.qzeros" not in source.infos:
            return _grouped(q, 8, scale, None)
        zero = self._values(source.read(f"{module}.qzeros"))[:, :groups]
        if self.symmetric:
            check_symmetric(module, zero, 8)
        return _grouped(q, zero, scale, None)

    def _values(self, words: Tensor) -> Tensor:
        """uint8 [out, n], of q or of zeros."""
        nibbles = unpack(words, 4)
        if self.gemv:
            return nibbles
        order = list(AWQ_COLUMNS)
        return nibbles.view(len(words), -1, 8)[..., order].flatten(1).T.contiguous()


@dataclass(frozen=True, slots=True)
class GptqForm:
    """qweight int32 [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out],
    g_idx [in], the group of each input, which may be in any order.

    stored_zero: what is added to a stored zero point: 1 in "gptq", 0 in "gptq_v2".
    """

    bits: int
    group_size: int
    symmetric: bool
    stored_zero: int
    name: str = "GPTQ"
    marker: str = ".qweight"
    endings: tuple[str, ...] = (".qweight", ".qzeros", ".scales", ".g_idx")
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        words, out_features = matrix(infos, f"{module}.qweight", self.name, torch.int32)
        in_features = words * WORD // self.bits
        groups = _num_groups(module, in_features, self.group_size)
        found(infos, f"{module}.scales", self.name)
        found(infos, f"{module}.qzeros", self.name, torch.int32)
        check_shape(infos, f"{module}.scales", (groups, out_features))
        check_shape(infos, f"{module}.qzeros", (groups, -(-out_features * self.bits // WORD)))
        check_shape(infos, f"{module}.g_idx", (in_features,))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        out_features, _ = self.shape(source, module)
        q = unpack(source.read(f"{module}.qweight").T, self.bits)
        scale = read_scale(source, f"{module}.scales").T.contiguous()
        zero = unpack(source.read(f"{module}.qzeros"), self.bits).T[:out_features]
        zero = zero.short() + self.stored_zero  # the highest stands for one that has no code
        if self.symmetric:
            check_symmetric(module, zero, 1 << self.bits - 1)
        return _grouped(q, zero, scale, _group_of(source, f"{module}.g_idx", scale.shape[1]))


@dataclass(frozen=True, slots=True)
class PackedForm:
    """compressed-tensors' pack-quantized: weight_packed int32 [out, in * bits / 32], stored
    2^(bits - 1) higher; weight_scale [out, groups]; weight_zero_point int32
    [out * bits / 32, groups], packed along the rows; weight_shape [2]; weight_g_idx [in].
    """

    bits: int
    group_size: int
    symmetric: bool
    name: str = "compressed-tensors packed integers"
    marker: str = ".weight_packed"
    endings: tuple[str, ...] = (
        ".weight_packed",
        ".weight_scale",
        ".weight_zero_point",
        ".weight_shape",
        ".weight_g_idx",
    )
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        out_features, words = matrix(infos, f"{module}.weight_packed", self.name, torch.int32)
        in_features = words * WORD // self.bits
        groups = _num_groups(module, in_features, self.group_size)
        found(infos, f"{module}.weight_scale", self.name)
        check_shape(infos, f"{module}.weight_scale", *_scale_shapes(out_features, groups))
        zeros = f"{module}.weight_zero_point"
        if not self.symmetric:
            found(infos, zeros, self.name, torch.int32)
            check_shape(infos, zeros, (-(-out_features * self.bits // WORD), groups))
        check_shape(infos, f"{module}.weight_g_idx", (in_features,))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        shape = self.shape(source, module)
        _check_said_shape(source, f"{module}.weight_shape", shape)
        q = unpack(source.read(f"{module}.weight_packed"), self.bits)
        groups = _num_groups(module, shape[1], self.group_size)
        scale = read_scale(source, f"{module}.weight_scale").view(-1, groups)
        scale = scale.expand(shape[0], groups)
        zero: Tensor | int = 1 << self.bits - 1
        if not self.symmetric:
            packed = source.read(f"{module}.weight_zero_point")
            zero = unpack(packed.T, self.bits)[:, : shape[0]].T
        return _grouped(q, zero, scale, _group_of(source, f"{module}.weight_g_idx", groups))


@dataclass(frozen=True, slots=True)
class Int8Form:
    """compressed-tensors' int-quantized (W8A8): weight int8 [out, in]; weight_scale [out, groups],
    or one number; weight_zero_point int8 of the same shape where it is not symmetric. ModelOpt's
    too, with pre_quant_scale [in] (SmoothQuant), what x is multiplied by first.
    """

    group_size: int
    symmetric: bool
    name: str = "compressed-tensors INT8"
    marker: str = ".weight_scale"
    endings: tuple[str, ...] = (
        ".weight",
        ".weight_scale",
        ".weight_zero_point",
        ".input_scale",
        ".input_zero_point",
        ".pre_quant_scale",
    )
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        out_features, in_features = matrix(infos, f"{module}.weight", self.name, torch.int8)
        groups = _num_groups(module, in_features, self.group_size)
        shapes = _scale_shapes(out_features, groups)
        found(infos, f"{module}.weight_scale", self.name)
        check_shape(infos, f"{module}.weight_scale", *shapes)
        if not self.symmetric:
            found(infos, f"{module}.weight_zero_point", self.name, torch.int8)
            check_shape(infos, f"{module}.weight_zero_point", *shapes)
        check_shape(infos, f"{module}.pre_quant_scale", (in_features,))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        out_features, in_features = self.shape(source, module)
        groups = _num_groups(module, in_features, self.group_size)
        scale = read_scale(source, f"{module}.weight_scale").view(-1, groups)
        zero: Tensor | int = 0
        if not self.symmetric:
            zero = source.read(f"{module}.weight_zero_point").view(-1, groups)
            zero = zero.expand(out_features, groups)
        q = source.read(f"{module}.weight")
        weight = _grouped(q, zero, scale.expand(out_features, groups), None)
        return _with_factors(weight, source, module)


@dataclass(frozen=True, slots=True)
class ModelOptInt4Form:
    """weight uint8 [out/2, in], the low nibble the even row, two's complement; weight_scale
    [out, in/g]; pre_quant_scale [in], what x is multiplied by first. In W4A8_AWQ weight_scale_2
    is of the product's FP8 and changes no weight.
    """

    group_size: int
    name: str = "ModelOpt INT4 AWQ"
    marker: str = ".weight_scale"
    endings: tuple[str, ...] = (
        ".weight",
        ".weight_scale",
        ".pre_quant_scale",
        ".input_scale",
        ".weight_scale_2",
    )
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        half, in_features = matrix(infos, f"{module}.weight", self.name, torch.uint8, torch.int8)
        groups = _num_groups(module, in_features, self.group_size)
        found(infos, f"{module}.weight_scale", self.name)
        check_shape(infos, f"{module}.weight_scale", (2 * half, groups))
        check_shape(infos, f"{module}.pre_quant_scale", (in_features,), (1, in_features))
        return 2 * half, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        self.shape(source, module)
        q = unpack_int4(source.read(f"{module}.weight").view(torch.int8))
        weight = _grouped(q, 0, read_scale(source, f"{module}.weight_scale"), None)
        factor = f"{module}.pre_quant_scale"
        return (
            weight.mul_(read_scale(source, factor).view(-1)) if factor in source.infos else weight
        )


def _with_factors(weight: Tensor, source: TensorSource, module: str) -> Tensor:
    """A weight whose inputs are multiplied by pre_quant_scale first, where there is one."""
    name = f"{module}.pre_quant_scale"
    return weight.mul_(read_scale(source, name).view(-1)) if name in source.infos else weight


def _scale_shapes(out_features: int, groups: int) -> Sequence[Shape]:
    """A scale for each group; of one group a row, or one for all, without that dimension too."""
    alone: Sequence[Shape] = ((out_features,), (1,), (), (1, 1)) if groups == 1 else ()
    return (out_features, groups), *alone


def _check_said_shape(source: TensorSource, name: str, wanted: tuple[int, int]) -> None:
    if name in source.infos and source.read(name).tolist() != list(wanted):
        raise CheckpointError(
            f"{name} says {source.read(name).tolist()}; the packed weight holds {list(wanted)}: "
            "download it again"
        )

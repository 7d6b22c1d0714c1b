"""How each quantised Hugging Face format stores a linear, and back to a QuantizedLinear.

A format reads the tensors of one module and knows their bits; it knows no model, no file and
nothing of what is made of them.
Source: AutoAWQ (`awq/utils/packing_utils.py`, version "gemm"; `WQLinear_GEMV`); AutoGPTQ and
GPTQModel (formats "gptq" and "gptq_v2"); compressed-tensors (`pack_to_int32`, "float-quantized");
ModelOpt (`modelopt/torch/export`, unified Hugging Face export).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from enginehouse.build.forms.packed_words import AWQ_COLUMNS, check_symmetric, unpack
from enginehouse.build.forms.quantized_linear import QuantizedLinear
from enginehouse.build.source import TensorInfo, TensorSource
from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.errors import CheckpointError

Infos = Mapping[str, TensorInfo]


class LinearFormat(Protocol):
    """name: what users call it. marker: the tensor that only a quantised module has.

    tensors: all that a module can have, without the module's name.
    """

    @property
    def name(self) -> str: ...

    @property
    def marker(self) -> str: ...

    @property
    def tensors(self) -> tuple[str, ...]: ...

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        """[out_features, in_features] of a module, without reading it."""

    def scale_name(self, module: str) -> str:
        """The tensor that holds the module's scales."""

    def check(self, source: TensorSource, module: str) -> None:
        """CheckpointError for what could only be refused after reading small tensors."""

    def read(self, source: TensorSource, module: str) -> QuantizedLinear: ...


def _signed(nibbles: Tensor) -> Tensor:
    """int8 in [-8, 7] from nibbles that were stored 8 higher."""
    return nibbles.to(torch.int8) - 8


def _check_group_index(source: TensorSource, name: str, group_size: int) -> None:
    """Refuse an order of activations that is not the inputs' own."""
    if name not in source.infos:
        return
    index = source.read(name).long()
    if not torch.equal(index, torch.arange(len(index)) // group_size):
        raise CheckpointError(
            f"{name} puts inputs into groups out of order (act-order, desc_act), for which "
            "TensorRT-LLM's int4 kernels have no form; pass --dequantize, or quantise again with "
            "desc_act=false"
        )


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """qweight int32 [in, out/8], qzeros int32 [in/g, out/8], scales [in/g, out]."""

    zero_point: bool
    name: str = "AutoAWQ"
    marker: str = "qweight"
    tensors: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        in_features, words = infos[f"{module}.qweight"].shape
        return words * 8, in_features

    def scale_name(self, module: str) -> str:
        return f"{module}.scales"

    def check(self, source: TensorSource, module: str) -> None:
        pass

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = self._columns(source.read(f"{module}.qweight"))
        scale = source.read(f"{module}.scales").T.contiguous()
        zero = None
        if f"{module}.qzeros" in source.infos:
            zero = self._columns(source.read(f"{module}.qzeros"))
            if not self.zero_point:
                check_symmetric(module, zero + 8, 8)
        return QuantizedLinear(q, scale, zero if self.zero_point else None)

    @staticmethod
    def _columns(words: Tensor) -> Tensor:
        """int8 [out, rows] from int32 [rows, out/8]."""
        nibbles = unpack(words, 4).view(len(words), -1, 8)[..., list(AWQ_COLUMNS)]
        return _signed(nibbles.flatten(1)).T.contiguous()


@dataclass(frozen=True, slots=True)
class AwqGemvFormat:
    """AutoAWQ's "gemv": qweight int32 [out, in/8], qzeros int32 [out, z], scales [out, 8z], both as
    wide as its kernel wants them, of which the first in/g count.
    """

    group_size: int
    zero_point: bool
    name: str = "AutoAWQ gemv"
    marker: str = "qweight"
    tensors: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        out_features, words = infos[f"{module}.qweight"].shape
        return out_features, words * 8

    def scale_name(self, module: str) -> str:
        return f"{module}.scales"

    def check(self, source: TensorSource, module: str) -> None:
        infos = source.infos
        out_features, in_features = self.shape(infos, module)
        groups, left = divmod(in_features, self.group_size)
        names = [f"{module}.{word}" for word in ("scales", "qzeros", "qweight")]
        scales, zeros, _ = (infos[name].shape if name in infos else () for name in names)
        width = scales[1] if len(scales) == 2 else 0
        right = scales[:1] == (out_features,) and zeros == (out_features, width // 8)
        if not right or width < groups or left:
            raise CheckpointError(
                f"{module}.scales has shape {list(scales)} and qzeros {list(zeros)}; groups of "
                f"{self.group_size} of {in_features} inputs and {out_features} outputs give at "
                f"least {[out_features, groups]} and an eighth as wide: do config.json and weights "
                "belong together?"
            )
        for name in names[1:]:
            if infos[name].dtype != torch.int32:
                raise CheckpointError(f"{name} has dtype {infos[name].dtype}; wanted int32")

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = _signed(unpack(source.read(f"{module}.qweight"), 4))
        groups = q.shape[1] // self.group_size
        scale = source.read(f"{module}.scales")[:, :groups].contiguous()
        zero = _signed(unpack(source.read(f"{module}.qzeros"), 4)[:, :groups]).contiguous()
        if not self.zero_point:
            check_symmetric(module, zero + 8, 8)
        return QuantizedLinear(q, scale, zero if self.zero_point else None)


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """qweight int32 [in/8, out], qzeros int32 [in/g, out/8], scales [in/g, out], g_idx [in].

    stored_zero: what is added to a stored zero point: 1 in "gptq", 0 in "gptq_v2".
    """

    group_size: int
    symmetric: bool
    stored_zero: int
    name: str = "GPTQ"
    marker: str = "qweight"
    tensors: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        words, out_features = infos[f"{module}.qweight"].shape
        return out_features, words * 8

    def scale_name(self, module: str) -> str:
        return f"{module}.scales"

    def check(self, source: TensorSource, module: str) -> None:
        _check_group_index(source, f"{module}.g_idx", self.group_size)

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = _signed(unpack(source.read(f"{module}.qweight").T, 4))
        stored = unpack(source.read(f"{module}.qzeros"), 4).T  # [out, groups]
        zero = _signed(stored + self.stored_zero).contiguous()
        scale = source.read(f"{module}.scales").T.contiguous()
        if self.symmetric:
            check_symmetric(module, zero + 8, 8)
        return QuantizedLinear(q, scale, None if self.symmetric else zero)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """compressed-tensors' pack-quantized: weight_packed int32 [out, in/8], weight_scale
    [out, in/g], weight_zero_point int32 [out/8, in/g] packed along the rows, weight_shape [2].
    """

    group_size: int
    symmetric: bool
    name: str = "compressed-tensors W4A16"
    marker: str = "weight_packed"
    tensors: tuple[str, ...] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        out_features, words = infos[f"{module}.weight_packed"].shape
        return out_features, words * 8

    def scale_name(self, module: str) -> str:
        return f"{module}.weight_scale"

    def check(self, source: TensorSource, module: str) -> None:
        _check_group_index(source, f"{module}.weight_g_idx", self.group_size)
        name = f"{module}.weight_shape"
        if name in source.infos:
            found, wanted = source.read(name).tolist(), list(self.shape(source.infos, module))
            if found != wanted:
                raise CheckpointError(
                    f"{name} says {found}; the packed weight holds {wanted}: download it again"
                )

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = _signed(unpack(source.read(f"{module}.weight_packed"), 4))
        scale = source.read(f"{module}.weight_scale")
        zero = None
        if not self.symmetric:
            packed = source.read(f"{module}.weight_zero_point")  # [out/8, groups]
            zero = _signed(unpack(packed.T, 4)[:, : len(q)]).T.contiguous()
        return QuantizedLinear(q, scale, zero)


@dataclass(frozen=True, slots=True)
class ModelOptInt4Format:
    """weight uint8 [out/2, in], low nibble the even row, two's complement; weight_scale
    [out, in/g]; pre_quant_scale [in] where the factor was not folded into the layer before.
    """

    name: str = "ModelOpt INT4 AWQ"
    marker: str = "weight_scale"
    tensors: tuple[str, ...] = ("weight", "weight_scale", "pre_quant_scale")

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        half, in_features = infos[f"{module}.weight"].shape
        return half * 2, in_features

    def scale_name(self, module: str) -> str:
        return f"{module}.weight_scale"

    def check(self, source: TensorSource, module: str) -> None:
        dtype = source.infos[f"{module}.weight"].dtype
        if dtype not in (torch.uint8, torch.int8):
            raise CheckpointError(f"{module}.weight has dtype {dtype}; wanted packed uint8")

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = unpack_int4(source.read(f"{module}.weight").view(torch.int8))
        factor = f"{module}.pre_quant_scale"
        return QuantizedLinear(
            q,
            source.read(f"{module}.weight_scale"),
            pre_quant_scale=source.read(factor).view(-1) if factor in source.infos else None,
        )


@dataclass(frozen=True, slots=True)
class ModelOptW4A8Format(ModelOptInt4Format):
    """The same with weight_scale_2 [] and input_scale [], of the product's FP8."""

    name: str = "ModelOpt W4A8 AWQ"
    tensors: tuple[str, ...] = (
        "weight",
        "weight_scale",
        "pre_quant_scale",
        "weight_scale_2",
        "input_scale",
    )

    def check(self, source: TensorSource, module: str) -> None:
        ModelOptInt4Format.check(self, source, module)
        for word in ("weight_scale_2", "input_scale"):
            info = source.infos.get(f"{module}.{word}")
            if info is None or info.shape not in ((), (1,)):
                found = "is missing" if info is None else f"has shape {list(info.shape)}"
                raise CheckpointError(
                    f"{module}.{word} {found}; wanted one number, as {self.name} has it: download "
                    "the checkpoint again, or pass --dequantize"
                )

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        linear = ModelOptInt4Format.read(self, source, module)
        second, entering = (
            source.read(f"{module}.{word}").float().view(1)
            for word in ("weight_scale_2", "input_scale")
        )
        return replace(linear, second_scale=second, activation_scale=entering)

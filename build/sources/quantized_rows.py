"""Formats that have one scale for a tensor or for each of its rows: FP8 and INT8.

As quantized_formats.py: a module's tensors, no model, no file.
Source: ModelOpt's and compressed-tensors' export ("float-quantized", "int-quantized"); AutoFP8;
transformers' FineGrainedFP8Config and FbgemmFp8Config.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.forms.quantized_linear import QuantizedLinear
from enginehouse.build.source import TensorSource
from enginehouse.build.sources.quantized_formats import Infos
from enginehouse.runtime.errors import CheckpointError


class _Rows:
    """A weight of one element a number, and a scale beside it."""

    __slots__ = ()

    def shape(self, infos: Infos, module: str) -> tuple[int, int]:
        out_features, in_features = infos[f"{module}.weight"].shape
        return out_features, in_features

    def scale_name(self, module: str) -> str:
        return f"{module}.weight_scale"


@dataclass(frozen=True, slots=True)
class Int8Format(_Rows):
    """weight int8 [out, in]; weight_scale [] or [1], or [out] or [out, 1]: compressed-tensors'
    int-quantized and ModelOpt's. What rounds activations is not read: the engine's are not rounded.
    """

    name: str = "INT8"
    marker: str = "weight_scale"
    tensors: tuple[str, ...] = (
        "weight",
        "weight_scale",
        "weight_zero_point",
        "input_scale",
        "input_zero_point",
    )

    def check(self, source: TensorSource, module: str) -> None:
        infos, zero = source.infos, f"{module}.weight_zero_point"
        info = infos[f"{module}.weight"]
        if info.dtype != torch.int8:
            raise CheckpointError(
                f"{module}.weight has dtype {info.dtype}; wanted int8, as its quantization_config "
                "says"
            )
        shape = infos[self.scale_name(module)].shape
        if shape not in ((), (1,), (info.shape[0],), (info.shape[0], 1)):
            raise CheckpointError(
                f"{module}.weight_scale has shape {list(shape)}; wanted one scale, or one for each "
                f"of {info.shape[0]} rows, as the engine's int8 has them; pass --dequantize"
            )
        if zero in infos and bool(source.read(zero).any()):
            raise CheckpointError(
                f"{zero} holds other numbers than zeros, for which the engine's int8 has no place; "
                "pass --dequantize"
            )
        if f"{module}.pre_quant_scale" in infos:
            raise CheckpointError(
                f"{module}.pre_quant_scale multiplies the inputs (SmoothQuant), for which the "
                "engine's int8 has no place; pass --dequantize"
            )

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        q = source.read(f"{module}.weight")
        scale = source.read(f"{module}.weight_scale").view(-1).expand(len(q))
        return QuantizedLinear(q, scale)


@dataclass(frozen=True, slots=True)
class Fp8Format(_Rows):
    """weight float8_e4m3fn [out, in]; weight_scale [] or [1], or [out] or [out, 1]; input_scale
    [] or [1] for static activations. ModelOpt's, compressed-tensors', AutoFP8's, transformers' (in
    other words) and FBGEMM's, whose input_scale_ub repeats a number of config.json.
    """

    name: str = "FP8"
    marker: str = "weight_scale"
    tensors: tuple[str, ...] = ("weight", "weight_scale", "input_scale", "input_scale_ub")

    def check(self, source: TensorSource, module: str) -> None:
        info = source.infos[f"{module}.weight"]
        if info.dtype != torch.float8_e4m3fn:
            raise CheckpointError(
                f"{module}.weight has dtype {info.dtype}; wanted float8_e4m3fn, as its "
                "quantization_config says"
            )
        inputs = source.infos.get(f"{module}.input_scale")
        if inputs is not None and inputs.shape not in ((), (1,)):
            raise CheckpointError(
                f"{module}.input_scale has shape {list(inputs.shape)}; wanted one number"
            )
        shape = source.infos[self.scale_name(module)].shape
        if shape not in ((), (1,), (info.shape[0],), (info.shape[0], 1)):
            raise CheckpointError(
                f"{module}.weight_scale has shape {list(shape)}; wanted one scale, or one for "
                f"each of {info.shape[0]} rows: TensorRT-LLM has no kernel for blocks of FP8; pass "
                "--dequantize where they are blocks"
            )

    def read(self, source: TensorSource, module: str) -> QuantizedLinear:
        return QuantizedLinear(
            source.read(f"{module}.weight"),
            self.scale(source, module),
            activation_scale=self.activation_scale(source, module),
        )

    def scale(self, source: TensorSource, module: str) -> Tensor:
        return source.read(f"{module}.weight_scale").float().view(-1)

    def activation_scale(self, source: TensorSource, module: str) -> Tensor | None:
        name = f"{module}.input_scale"
        return source.read(name).float().view(1) if name in source.infos else None

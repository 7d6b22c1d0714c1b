"""What is quantised together, and how: a unit of the source becomes tensors of the checkpoint.

A unit is one tensor, or for FP8 the pair fc and gate, which share a scale, or for AWQ the linears
of one layer. Tensors are whole here; who cuts and writes them is convert.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.architectures import TensorRow, stage_rows
from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.forms import is_quantized
from enginehouse.build.quantization import (
    check_finite,
    fp8_scale,
    quantize_fp8,
    quantize_fp8_rowwise,
    quantize_int4,
)
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.packing import pack_int4

# The tensors of one layer's linears, by the layer's number in the whole model: asked for once
# each, in order. {"attention.qkv.weight": ..., "attention.qkv.weights_scaling_factor": ...}
LayerLinears = Callable[[int], Mapping[str, Tensor]]


class Calibration(NamedTuple):
    """What calibration found; layers count through the whole model. Empty where not needed.

    maxima: largest input magnitude of a linear, `transformer.layers.3.attention.qkv`.
    kv_scales: of each layer's keys and values. linears: quantised already, for the AWQ forms.
    """

    maxima: Mapping[str, float]
    kv_scales: Mapping[int, float]
    linears: LayerLinears | None = None


class Unit(NamedTuple):
    """Tensors of one pipeline stage that are converted together."""

    pp_rank: int
    rows: list[TensorRow]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.pp_rank}:{self.rows[0].target}"


def read_row(row: TensorRow, source: SourceCheckpoint, config: ModelConfig) -> Tensor:
    """A TensorRT-LLM tensor from its sources, as its recipe says, in the source's dtype.

    What one was added to is float32: the sum is rounded once, to the checkpoint's dtype.
    """
    if source.rows is not None:  # its recipe was followed when the folder was made
        whole = source.rows.read_row(row.sources)
        check_finite(row.target, whole)
        return whole
    parts = [source.tensors.read(name) for name in row.sources]
    for name, part in zip(row.sources, parts, strict=True):
        check_finite(name, part)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if row.recipe == "experts":
        return whole.view(config.num_experts, -1, whole.shape[1])
    if row.recipe == "swap_halves":
        return whole.roll(len(whole) // 2, dims=0)
    return whole.float() + 1 if row.recipe == "plus_one" else whole


def units(config: ModelConfig, source: SourceCheckpoint) -> Iterator[Unit]:
    """The whole model's rows as they must be converted together: fc and gate under FP8, the
    linears of a layer that was quantised as one, else each row alone. Those that the source has
    quantised are each alone.
    """
    for pp_rank in range(config.mapping.pp_size):
        for rows in _stage_units(config, pp_rank, source.quantized is not None):
            yield Unit(pp_rank, rows)


def _stage_units(config: ModelConfig, pp_rank: int, alone: bool) -> Iterator[list[TensorRow]]:
    quantization = config.quantization
    fc: TensorRow | None = None
    waiting: list[TensorRow] = []  # of one layer
    for row in stage_rows(config, pp_rank):
        quantised = not alone and is_quantized(quantization, row.target)
        paired = quantization.quant_algo == "FP8" and not config.gate_in_fc
        if quantised and quantization.pre_quant_scale:
            if waiting and _layer_of(waiting[0].target) != _layer_of(row.target):
                yield waiting
                waiting = []
            waiting.append(row)
        elif quantised and paired and "mlp.fc." in row.target:
            fc = row
        elif quantised and paired and "mlp.gate." in row.target:
            assert fc is not None, "the table lists fc before gate"
            yield [fc, row]
        else:
            yield [row]
    if waiting:
        yield waiting


def awq_layer(config: ModelConfig, unit: Unit) -> int | None:
    """The layer, in the whole model, whose linears the unit is; None for any other unit."""
    target = unit.rows[0].target
    if not config.quantization.pre_quant_scale or not is_quantized(config.quantization, target):
        return None
    return stage_layers(config, unit.pp_rank)[_layer_of(target)]


def _layer_of(target: str) -> int:
    """The local layer of `transformer.layers.3.mlp.fc.weight`: 3."""
    return int(target.split(".")[2])


def stage_layers(config: ModelConfig, pp_rank: int) -> range:
    """The layers of a pipeline stage, as the whole model counts them."""
    return config.mapping.layers(pp_rank, config.num_hidden_layers)


def source_bytes(row: TensorRow, source: SourceCheckpoint) -> int:
    """Bytes of a row's tensors as the source has them, dequantised."""
    infos = [source.tensors.infos[name] for name in row.sources]
    return sum(prod(info.shape) * info.dtype.itemsize for info in infos)


def unit_bytes(unit: Unit, config: ModelConfig, source: SourceCheckpoint) -> int:
    """What a unit takes at its peak: its sources, and a second time where they are changed."""
    names = [name for row in unit.rows for name in row.sources]
    kept = len(names) == 1 and not is_quantized(config.quantization, unit.rows[0].target)
    kept = kept and source.tensors.infos[names[0]].dtype == getattr(torch, config.dtype)
    return sum(source_bytes(row, source) for row in unit.rows) * (1 if kept else 2)


def convert_unit(
    config: ModelConfig, unit: Unit, source: SourceCheckpoint, calibration: Calibration
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors of a unit, by their TensorRT-LLM names, whole (before any cut)."""
    pp_rank, rows = unit
    dtype: torch.dtype = getattr(torch, config.dtype)
    quantization = config.quantization
    algo = quantization.quant_algo
    if algo == "W8A16" or not is_quantized(quantization, rows[0].target):
        for row in rows:
            router = row.target.endswith("router.weight")
            yield row.target, read_row(row, source, config).to(torch.float32 if router else dtype)
    elif source.quantized is not None:
        for row in rows:
            for kind, tensor in source.quantized.engine_tensors(row.sources, config).items():
                yield row.target.removesuffix("weight") + kind, tensor
    elif quantization.pre_quant_scale:
        assert calibration.linears is not None
        local = _layer_of(rows[0].target)
        linears = calibration.linears(stage_layers(config, pp_rank)[local])
        for name, tensor in linears.items():
            yield f"transformer.layers.{local}.{name}", tensor
    elif algo == "FP8":
        yield from _convert_fp8(config, pp_rank, rows, source, calibration.maxima)
    elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
        for row in rows:
            q, scale = quantize_fp8_rowwise(read_row(row, source, config))
            yield row.target, q
            yield row.target.removesuffix("weight") + "per_channel_scale", scale
    else:
        for row in rows:
            weight = read_row(row, source, config)
            q, scale = quantize_int4(weight, quantization.group_size, dtype)
            yield row.target, pack_int4(q)
            yield row.target.removesuffix("weight") + "weights_scaling_factor", scale


def _convert_fp8(
    config: ModelConfig,
    pp_rank: int,
    rows: list[TensorRow],
    source: SourceCheckpoint,
    maxima: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    weights = [read_row(row, source, config) for row in rows]
    if weights[0].ndim == 3:
        yield from _convert_fp8_experts(config, pp_rank, rows[0], weights[0], maxima)
        return
    scale = fp8_scale(max(float(weight.abs().amax()) for weight in weights))
    for row in rows:
        module = row.target.removesuffix(".weight")
        amax = maxima[global_name(config, pp_rank, module.replace("mlp.gate", "mlp.fc"))]
        yield row.target, quantize_fp8(weights.pop(0), scale)
        yield f"{module}.weights_scaling_factor", torch.tensor([scale])
        yield f"{module}.activation_scaling_factor", torch.tensor([fp8_scale(amax)])


def _convert_fp8_experts(
    config: ModelConfig,
    pp_rank: int,
    row: TensorRow,
    weight: Tensor,
    maxima: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """A scale for each expert, [experts, 1]; one for what enters them.

    weight: [experts, out_features, in_features]. An expert that calibration never chose shares
    the maximum of those it did.
    """
    module = row.target.removesuffix(".weight")
    scales = [fp8_scale(float(expert.abs().amax())) for expert in weight]
    quantized = [quantize_fp8(expert, s) for expert, s in zip(weight, scales, strict=True)]
    amax = maxima[global_name(config, pp_rank, module)]
    yield row.target, torch.stack(quantized)
    yield f"{module}.weights_scaling_factor", torch.tensor(scales).unsqueeze(1)
    yield f"{module}.activation_scaling_factor", torch.tensor([fp8_scale(amax)])


def global_name(config: ModelConfig, pp_rank: int, name: str) -> str:
    """A name with its stage's local layer index replaced by the model's."""
    head, layers, rest = name.partition(".layers.")
    if not layers:
        return name
    local, _, tail = rest.partition(".")
    first = stage_layers(config, pp_rank).start
    return f"{head}.layers.{first + int(local)}.{tail}"

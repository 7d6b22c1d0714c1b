"""A plan and a source become the tensors of a checkpoint, whole, for a sink that writes them.

Tensor by tensor: read, fuse, quantise, put into the sink. What is
held at a time is one fused tensor in the source's dtype and its quantised form (for FP8, the
pair fc and gate, which share a scale; for AWQ, the linears of one layer), never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.architectures import TensorRow, stage_rows
from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.forms import is_quantized
from enginehouse.build.plan import KV_SCALE, BuildPlan
from enginehouse.build.quantization import (
    check_finite,
    fp8_scale,
    quantize_fp8,
    quantize_fp8_rowwise,
    quantize_int4,
)
from enginehouse.build.rank_files import Sink
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.packing import pack_int4

Advance = Callable[[int], None]
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


def convert(
    plan: BuildPlan,
    source: SourceCheckpoint,
    sink: Sink,
    calibration: Calibration,
    advance: Advance,
) -> None:
    """Put every tensor of the plan into the sink; advance(bytes) after each write.

    Raises QuantizationError for weights with NaN or Inf.
    """
    config = plan.config
    for pp_rank in range(config.mapping.pp_size):
        alone = source.quantized is not None
        for rows in _units(config, pp_rank, alone):
            for name, tensor in _convert_unit(config, pp_rank, rows, source, calibration):
                advance(sum(item.num_bytes for item in sink.put(pp_rank, name, tensor)))
        if config.quantization.kv_cache_quant_algo is not None:
            for local, layer in enumerate(_stage_layers(config, pp_rank)):
                scale = torch.tensor([calibration.kv_scales[layer]])
                sink.put(pp_rank, KV_SCALE.format(local), scale)
    sink.finish()


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


def _units(config: ModelConfig, pp_rank: int, alone: bool) -> Iterator[list[TensorRow]]:
    """Rows that must be converted together: fc and gate under FP8, the linears of a layer that
    was quantised as one, else each row alone. alone: all of them, as they are quantised already.
    """
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


def _layer_of(target: str) -> int:
    """The local layer of `transformer.layers.3.mlp.fc.weight`: 3."""
    return int(target.split(".")[2])


def _stage_layers(config: ModelConfig, pp_rank: int) -> range:
    return config.mapping.layers(pp_rank, config.num_hidden_layers)


def _convert_unit(
    config: ModelConfig,
    pp_rank: int,
    rows: list[TensorRow],
    source: SourceCheckpoint,
    calibration: Calibration,
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors of these rows, whole (before any cut)."""
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
        linears = calibration.linears(_stage_layers(config, pp_rank)[local])
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
    first = _stage_layers(config, pp_rank).start
    return f"{head}.layers.{first + int(local)}.{tail}"

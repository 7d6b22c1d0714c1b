"""What is quantised together, and how: a unit of the source becomes tensors of the checkpoint.

A unit is one tensor, or for FP8 and AWQ the linears of one layer. Tensors are whole here; who cuts
and writes them is the business of convert/conversion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.row_orders import reordered, reorders
from enginehouse.build.families.rows import STACKS, TensorRow
from enginehouse.build.forms.block_floats import FP8_BLOCK, MX_BLOCK
from enginehouse.build.forms.block_quantization import quantize_fp8_blocks, quantize_mxfp8
from enginehouse.build.forms.padding import NO_PADDING, Padding
from enginehouse.build.forms.quantization import (
    check_finite,
    in_dtype,
    quantize_fp8_rowwise,
    quantize_int4,
)
from enginehouse.build.forms.weight_forms import FLOAT32_WORDS, is_quantized
from enginehouse.build.quantize.layer_errors import WEIGHTS, ErrorLog, ErrorSum
from enginehouse.build.quantize.pieces import Pieces, can_be_cut, read_pieces
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import pack_int4
from enginehouse.runtime.config import ModelConfig, QuantConfig

_BY_LAYER = ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
# The tensors of one layer's linears, by the layer's number in the whole model: asked for once
# each, in order. {"attention.qkv.weight": ..., "attention.qkv.weights_scaling_factor": ...}
LayerLinears = Callable[[int], Mapping[str, Tensor]]


class Calibration(NamedTuple):
    """What calibration found; layers count through the whole model. Empty where not needed.

    kv_scales: of each layer's keys and values. linears: quantised already, where that is done
    layer by layer.
    """

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
    whole = joined(row, read_parts(row, source), config)
    return whole.float() + 1 if row.recipe == "plus_one" else whole


def read_parts(row: TensorRow, source: SourceCheckpoint) -> list[Tensor]:
    """A row's own tensors, as the source has them."""
    parts = [source.tensors.read(name) for name in row.sources]
    for name, part in zip(row.sources, parts, strict=True):
        check_finite(name, part)
    return parts


def joined(row: TensorRow, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """One tensor of a row's parts, their rows in TensorRT-LLM's order."""
    if row.recipe == "router":
        weight, factor = (part.float() for part in parts)
        weight *= factor * weight.shape[1] ** -0.5
        return weight
    whole = parts[0] if len(parts) == 1 else torch.cat([as_bytes(part) for part in parts])
    if row.recipe == "experts":
        whole = whole.view(config.num_experts, -1, whole.shape[1])
    if reorders(row.recipe):
        whole = reordered(config, row.recipe, whole)
    if row.recipe == "stacked_halves":
        return whole.roll(whole.shape[1] // 2, dims=1)
    if row.recipe == "flat":
        return whole.flatten()
    if row.recipe == "qkv_by_heads":  # a convolution of each channel by itself
        return whole.flatten(1)
    if row.recipe in ("turned_experts", "turned_pairs", "turned_halves"):
        whole = whole.mT.contiguous()
    if row.recipe == "turned_halves":
        return whole.roll(whole.shape[1] // 2, dims=1)
    if row.recipe in ("turned_pairs", "pairs"):  # gate, up, gate, up: of outputs, the last but one
        dim = whole.ndim - (2 if row.recipe == "turned_pairs" else 1)
        gate, up = whole.unflatten(dim, (-1, 2)).unbind(dim + 1)
        return torch.cat([up, gate], dim=dim)
    return whole.view(parts[0].dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """Also of float8, which torch neither joins nor rolls on every device."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def by_layer(quantization: QuantConfig) -> bool:
    """Whether the form needs its linears quantised layer after layer, as the text meets them."""
    return quantization.pre_quant_scale or quantization.quant_algo in _BY_LAYER


def units(config: ModelConfig, source: SourceCheckpoint) -> Iterator[Unit]:
    """The whole model's rows as they must be converted together: the linears of a layer that is
    quantised as one, else each row alone. Those that the source has quantised are each alone.
    """
    together = by_layer(config.quantization) and source.quantized is None
    for pp_rank in range(config.mapping.pp_size):
        for rows in _stage_units(config, pp_rank, together):
            yield Unit(pp_rank, rows)


def _stage_units(config: ModelConfig, pp_rank: int, together: bool) -> Iterator[list[TensorRow]]:
    waiting: list[TensorRow] = []  # of one layer
    for row in stage_rows(config, pp_rank):
        if not together or not is_quantized(config.quantization, row.target):
            yield [row]
            continue
        if waiting and _layer_of(waiting[0].target) != _layer_of(row.target):
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def layer_of_unit(config: ModelConfig, unit: Unit) -> int | None:
    """The layer, in the whole model, whose linears the unit is; None for any other unit."""
    target = unit.rows[0].target
    if not by_layer(config.quantization) or not is_quantized(config.quantization, target):
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


def is_whole(
    row: TensorRow, source: SourceCheckpoint, config: ModelConfig, padding: Padding = NO_PADDING
) -> bool:
    """Whether a row's tensor is held as one while it is converted, and not in pieces."""
    quantised = is_quantized(config.quantization, row.target)
    by_itself = source.quantized is None and not by_layer(config.quantization)
    in_pieces = can_be_cut(row, source) and not padding.applies(row.target)
    return (quantised and not by_itself) or not in_pieces


def unit_bytes(
    unit: Unit,
    config: ModelConfig,
    source: SourceCheckpoint,
    uncut: bool,
    padding: Padding = NO_PADDING,
) -> int:
    """What a unit takes at its peak: its sources, and a second time where they are changed; of
    what goes in pieces, next to nothing. uncut: the sink takes whole tensors.
    """
    rows = [row for row in unit.rows if uncut or is_whole(row, source, config, padding)]
    names = [name for row in rows for name in row.sources]
    kept = len(names) == 1 and not is_quantized(config.quantization, unit.rows[0].target)
    kept = kept and source.tensors.infos[names[0]].dtype == getattr(torch, config.dtype)
    return sum(source_bytes(row, source) for row in rows) * (1 if kept else 2)


def convert_unit(
    config: ModelConfig,
    unit: Unit,
    source: SourceCheckpoint,
    calibration: Calibration,
    padding: Padding = NO_PADDING,
    errors: ErrorLog | None = None,
) -> Iterator[tuple[str, Pieces]]:
    """The checkpoint's tensors of a unit, by their TensorRT-LLM names, uncut and padded. The pieces
    of each must be gone through before the next is asked for. What calibration has quantised is
    padded already. errors: where it is told how far weights that are rounded here have moved.
    """
    pp_rank, rows = unit
    quantization = config.quantization
    algo = quantization.quant_algo
    own = source.quantized is not None and source.engine_config is None
    at_load = algo == "W8A16" and not own  # whoever loads the engine quantises it
    if at_load or not is_quantized(quantization, rows[0].target):
        for row in rows:
            dtype: torch.dtype = getattr(torch, config.dtype)
            if ".mlp.router." in row.target or row.target.endswith(FLOAT32_WORDS):
                dtype = torch.float32
            shape, parts = _pieces(row, source, config, padding)
            yield row.target, Pieces(shape, (in_dtype(row.target, part, dtype) for part in parts))
    elif source.quantized is not None:
        for row in rows:
            for kind, tensor in source.quantized.engine_tensors(row.sources, config).items():
                name = row.target.removesuffix("weight") + kind
                yield name, Pieces.of(padding.pad(name, tensor))
    elif by_layer(quantization):
        assert calibration.linears is not None
        local = _layer_of(rows[0].target)
        linears = calibration.linears(stage_layers(config, pp_rank)[local])
        for name, tensor in linears.items():
            yield f"transformer.layers.{local}.{name}", Pieces.of(tensor)
    else:
        for row in rows:
            seen = ErrorSum()
            yield from _convert_linear(row, source, config, padding, seen)
            if errors is not None and row.target.startswith("transformer.layers."):
                layer = stage_layers(config, pp_rank)[_layer_of(row.target)]
                errors.add(WEIGHTS, layer, row.target, seen.error, seen.whole)


def _convert_linear(
    row: TensorRow,
    source: SourceCheckpoint,
    config: ModelConfig,
    padding: Padding,
    seen: ErrorSum,
) -> Iterator[tuple[str, Pieces]]:
    """A weight whose rows can each be quantised alone, then its scales."""
    module = row.target.removesuffix("weight")
    if config.quantization.quant_algo in ("FP8_PB_WO", "MXFP8"):
        yield from _convert_blocks(row, source, config, seen)
        return
    if row.recipe == "experts" or row.recipe.startswith(STACKS):
        yield from _convert_experts(row, source, config, padding, seen)
        return
    (height, width), parts = _pieces(row, source, config, padding)
    scales: list[Tensor] = []
    if config.quantization.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":

        def rowwise() -> Iterator[Tensor]:
            for part in parts:
                q, scale = quantize_fp8_rowwise(part)
                seen.see(part, q, scale)
                scales.append(scale)
                yield q

        yield row.target, Pieces((height, width), rowwise())
        yield f"{module}per_channel_scale", Pieces.of(torch.cat(scales))
        return
    group_size, dtype = config.quantization.group_size, getattr(torch, config.dtype)

    def grouped() -> Iterator[Tensor]:
        for part in parts:
            q, scale = quantize_int4(part, group_size, dtype)
            seen.see(part, q, scale, group_size)
            scales.append(scale)
            yield pack_int4(q)

    yield row.target, Pieces((height // 2, width), grouped())
    yield f"{module}weights_scaling_factor", Pieces.of(torch.cat(scales))


def _convert_blocks(
    row: TensorRow, source: SourceCheckpoint, config: ModelConfig, seen: ErrorSum
) -> Iterator[tuple[str, Pieces]]:
    """MXFP8 and block FP8: blocks lie in the source's own tensors, experts' too. The scale stands
    once for each output.
    """
    mx = config.quantization.quant_algo == "MXFP8"
    quantize, height = (quantize_mxfp8, 1) if mx else (quantize_fp8_blocks, FP8_BLOCK[0])
    turned = row.recipe.startswith("turned")
    parts = _experts_parts(row, source, config) if turned else read_parts(row, source)
    row = row._replace(recipe="experts") if turned else row
    made = [quantize(part) for part in parts]
    scales = [scale.repeat_interleave(height, dim=0)[: len(q)] for q, scale, _ in made]
    for part, (q, _, _), scale in zip(parts, made, scales, strict=True):
        seen.see(part, q, scale, MX_BLOCK[1] if mx else FP8_BLOCK[1])
    yield row.target, Pieces.of(joined(row, [q for q, _, _ in made], config))
    name = row.target.removesuffix("weight") + "weights_scaling_factor"
    yield name, Pieces.of(joined(row, scales, config))


def _experts_parts(row: TensorRow, source: SourceCheckpoint, config: ModelConfig) -> list[Tensor]:
    """Of experts that are one tensor, each's own, up before gate."""
    halves = 2 if row.target.endswith("fc.weight") else 1
    return [part for expert in read_row(row, source, config) for part in expert.chunk(halves)]


def _convert_experts(
    row: TensorRow,
    source: SourceCheckpoint,
    config: ModelConfig,
    padding: Padding,
    seen: ErrorSum,
) -> Iterator[tuple[str, Pieces]]:
    """All experts of a layer, each quantised alone; then their scales, one expert after another."""
    module, quantization = row.target.removesuffix("weight"), config.quantization
    found: list[tuple[Tensor, Tensor]] = []
    for expert in padding.pad(row.target, read_row(row, source, config)):
        if quantization.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":
            found.append(quantize_fp8_rowwise(expert))
            seen.see(expert, *found[-1])
            continue
        dtype: torch.dtype = getattr(torch, config.dtype)
        q, scale = quantize_int4(expert, quantization.group_size, dtype)
        seen.see(expert, q, scale, quantization.group_size)
        found.append((pack_int4(q), scale))
    rowwise = quantization.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN"
    kinds = ("weight", "per_channel_scale" if rowwise else "weights_scaling_factor")
    for kind, parts in zip(kinds, zip(*found, strict=True), strict=True):
        yield f"{module}{kind}", Pieces.of(torch.stack(parts))


def _pieces(
    row: TensorRow, source: SourceCheckpoint, config: ModelConfig, padding: Padding
) -> Pieces:
    """A row's tensor, padded; in one piece where its recipe or padding needs it whole."""
    if padding.applies(row.target):
        return Pieces.of(padding.pad(row.target, read_row(row, source, config)))
    if can_be_cut(row, source):
        return read_pieces(row, source)
    return Pieces.of(read_row(row, source, config))

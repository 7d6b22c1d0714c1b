"""A plan and a source become a TensorRT-LLM checkpoint: config.json and rankN.safetensors.

Tensor by tensor: read, fuse, quantise, cut, write to every rank that holds a part. What is
held at a time is one fused tensor in the source's dtype and its quantised form (for FP8, the
pair fc and gate, which share a scale), never the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from enginehouse.build.architectures import TensorRow, stage_rows
from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.plan import BuildPlan, output_tensors
from enginehouse.build.quantization import (
    check_finite,
    fp8_scale,
    quantize_fp8,
    quantize_int4,
)
from enginehouse.build.rank_file import RankFile
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.packing import pack_int4
from enginehouse.runtime.sharding import shard_tensor

# Largest input magnitude of a linear, by its name: `transformer.layers.3.attention.qkv`, where
# layers count through the whole model.
ActivationMaxima = Mapping[str, float]
Advance = Callable[[int], None]


def convert(
    plan: BuildPlan,
    source: SourceCheckpoint,
    directory: Path,
    maxima: ActivationMaxima,
    advance: Advance,
) -> None:
    """Write the checkpoint into an existing directory; advance(bytes) after each write.

    maxima: needed for FP8, else empty. Raises QuantizationError for weights with NaN or Inf.
    """
    config = plan.config
    for pp_rank in range(config.mapping.pp_size):
        table = output_tensors(config, pp_rank, plan.scale_dtype)
        with ExitStack() as stack:
            files = [
                stack.enter_context(
                    RankFile(
                        directory / f"rank{config.mapping.rank(pp_rank, tp)}.safetensors", table
                    )
                )
                for tp in range(config.mapping.tp_size)
            ]
            for rows in _units(config, pp_rank):
                for name, tensor in _convert_unit(config, pp_rank, rows, source, maxima):
                    for tp_rank, file in enumerate(files):
                        advance(file.write(name, shard_tensor(name, tensor, config, tp_rank)))
    text = json.dumps(config.to_dict(), indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def read_row(row: TensorRow, source: SourceCheckpoint) -> Tensor:
    """A TensorRT-LLM tensor from its sources: concatenated on dim 0, in the source's dtype."""
    if source.rows is not None:
        whole = source.rows.read_row(row.sources)
        check_finite(row.target, whole)
        return whole
    parts = [source.tensors.read(name) for name in row.sources]
    for name, part in zip(row.sources, parts, strict=True):
        check_finite(name, part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _units(config: ModelConfig, pp_rank: int) -> Iterator[list[TensorRow]]:
    """Rows that must be converted together: fc and gate under FP8, else each alone."""
    fc: TensorRow | None = None
    for row in stage_rows(config, pp_rank):
        if config.quantization.quant_algo == "FP8":
            if row.target.endswith("mlp.fc.weight"):
                fc = row
                continue
            if row.target.endswith("mlp.gate.weight"):
                assert fc is not None, "the table lists fc before gate"
                yield [fc, row]
                continue
        yield [row]


def _convert_unit(
    config: ModelConfig,
    pp_rank: int,
    rows: list[TensorRow],
    source: SourceCheckpoint,
    maxima: ActivationMaxima,
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors of these rows, whole (before any cut)."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    algo = config.quantization.quant_algo
    if algo is None or not is_quantized(rows[0].target):
        for row in rows:
            yield row.target, read_row(row, source).to(dtype)
    elif source.quantized is not None:
        for row in rows:
            for kind, tensor in source.quantized.engine_tensors(row.sources, config).items():
                yield row.target.removesuffix("weight") + kind, tensor
    elif algo == "FP8":
        yield from _convert_fp8(config, pp_rank, rows, source, maxima)
    else:
        for row in rows:
            weight = read_row(row, source)
            q, scale = quantize_int4(weight, config.quantization.group_size, dtype)
            yield row.target, pack_int4(q)
            yield row.target.removesuffix("weight") + "weights_scaling_factor", scale


def is_quantized(target: str) -> bool:
    """Whether a tensor is a linear's weight inside a decoder layer."""
    return ".layers." in target and target.endswith(".weight") and "layernorm" not in target


def _convert_fp8(
    config: ModelConfig,
    pp_rank: int,
    rows: list[TensorRow],
    source: SourceCheckpoint,
    maxima: ActivationMaxima,
) -> Iterator[tuple[str, Tensor]]:
    weights = [read_row(row, source) for row in rows]
    scale = fp8_scale(max(float(weight.abs().amax()) for weight in weights))
    for row in rows:
        module = row.target.removesuffix(".weight")
        amax = maxima[global_name(config, pp_rank, module.replace("mlp.gate", "mlp.fc"))]
        yield row.target, quantize_fp8(weights.pop(0), scale)
        yield f"{module}.weights_scaling_factor", torch.tensor([scale])
        yield f"{module}.activation_scaling_factor", torch.tensor([fp8_scale(amax)])


def global_name(config: ModelConfig, pp_rank: int, name: str) -> str:
    """A name with its stage's local layer index replaced by the model's."""
    head, layers, rest = name.partition(".layers.")
    if not layers:
        return name
    local, _, tail = rest.partition(".")
    first = config.mapping.layers(pp_rank, config.num_hidden_layers).start
    return f"{head}.layers.{first + int(local)}.{tail}"

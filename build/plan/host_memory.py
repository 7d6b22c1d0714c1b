"""What a conversion holds at most, in bytes: an estimate from shapes, before a weight is read."""

from __future__ import annotations

from math import prod

import torch

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.output_table import linear_shapes
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.forms.padding import Padding
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.quantize.layerwise import SHARED_INPUTS
from enginehouse.build.quantize.units import by_layer, is_whole
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.carried import carried
from enginehouse.runtime.config import Mapping, ModelConfig

# What the interpreter, torch and the file buffers hold besides tensors.
_BASE_BYTES = 640 << 20
# Matrices [in, in] of a linear's inputs at once: two moments, or one and its factor; for AWQ an
# inverse too. Copies of the linear, and of those that share its input: as measured.
_FP8_MATRICES, _AWQ_MATRICES = 2, 3
_COPIES = 7
_SEARCH_BYTES = 512 << 20  # AWQ's trials, as measured


def peak_memory_bytes(
    config: ModelConfig, source: SourceCheckpoint, settings: BuildSettings, padding: Padding
) -> int:
    """For the whole conversion, with calibration where it goes layer by layer."""
    needed = _largest_whole(config, source, settings, padding)
    if by_layer(config.quantization) and source.quantized is None:
        needed = max(needed, _layer_bytes(config, settings))
    return _BASE_BYTES + needed


def _largest_whole(
    config: ModelConfig, source: SourceCheckpoint, settings: BuildSettings, padding: Padding
) -> int:
    """The largest fused tensor that is held whole, as it is read, and once more in float32 or as it
    is written.
    """
    shapes = expected_shapes(config)
    infos = source.tensors.infos if source.has_weights else {}
    dtype: torch.dtype = getattr(torch, config.dtype)
    largest = 0
    for pp_rank in range(config.mapping.pp_size):
        for row in stage_rows(config, pp_rank):
            if settings.format != "hf" and not is_whole(row, source, config, padding):
                continue
            read = sum(
                prod(shapes[name]) * (infos[name].dtype if infos else dtype).itemsize
                for name in row.sources
            )
            quantised = config.quantization.quant_algo and "layers" in row.target
            width = 4 if quantised else dtype.itemsize
            copy = sum(prod(shapes[name]) for name in row.sources) * width
            largest = max(largest, read + copy)
    return largest


def _layer_bytes(config: ModelConfig, settings: BuildSettings) -> int:
    """What a walk over the layers holds: one in float32, the moments of one linear's inputs and
    copies of it, and the activations, twice, with those that enter one layer.
    """
    whole = config.with_mapping(Mapping(1))
    sizes = [0] * config.num_hidden_layers
    for name, shape in expected_shapes(whole).items():
        if ".layers." in name:
            sizes[int(name.split(".layers.")[1].split(".")[0])] += prod(shape)
    layer = max(sizes)
    linears = linear_shapes(whole, sizes.index(layer))
    awq = config.quantization.pre_quant_scale
    matrices, search = (_AWQ_MATRICES, _SEARCH_BYTES) if awq else (_FP8_MATRICES, 0)
    largest = 0
    for shared in SHARED_INPUTS:
        shapes = [linears[name] for name in shared if name in linears]
        if shapes:  # experts are none
            width, height = shapes[0].in_features, sum(shape.out_features for shape in shapes)
            largest = max(largest, matrices * width**2 + _COPIES * width * height)
    tokens = settings.calib_samples * settings.calib_length
    inputs = sum(linear.in_features for linear in linears.values())
    activations = tokens * (2 * 4 * carried(config).width + 2 * inputs)
    return 4 * layer + 4 * largest + activations + search

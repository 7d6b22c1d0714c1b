"""The structures that the compiled kernels read, and the names and sizes of what they are given.

Knows no library and no file. Their other half is native/shape.h and native/linear.h.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_void_p

import msgspec

from enginehouse.runtime.cpu.kernel_sizes import BYTES_PART, LANES
from enginehouse.runtime.cpu.packed_file import LayerShape, LinearShape, Network

LINEAR = ("in_qkvz", "in_ba", "linear_dense")  # of linear attention
INPUTS_OF_LAYER = ("input_gate", "input_proj")  # of what a layer gets of a token besides
LOW_RANK = ("low_left", "low_right")  # of a learned residual
HEAD, INPUTS_OF_ALL = "lm_head", "inputs"  # the whole model's
EXPERTS, OF_HEADS = ("expert_fc_gate", "expert_proj"), ("of_keys", "of_values")  # of each of them
OF_STREAMS = ("stream_openings", "stream_merges")  # of each residual stream but the first
LINEARS = (
    *("qkv", "dense", "fc_gate", "gate", "proj", "kv_a", "q_a", "q", *LINEAR, *INPUTS_OF_LAYER),
    *(*LOW_RANK, HEAD, INPUTS_OF_ALL, *EXPERTS, *OF_HEADS, *OF_STREAMS),
)
NORMS = (
    *("input_", "post_", "pre_feedforward_", "post_feedforward_"),
    *("attention.q_", "attention.k_", "attention.q_a_", "attention.kv_a_"),
    *("pre_experts_", "post_shared_", "post_experts_", "per_layer_", "stream_", "laurel_"),
)
FINAL_NORM = "ln_f"
PARTS = ("weight", "scales", "zeros", "counts", "bias", "factor")  # of a linear
ACTIVATIONS = ("silu", "gelu", "relu2", "gelu_erf")
TIMES = ("linears", "attention", "head", "rows")  # of a step; rows: norms, sums and rounding

_SIZES = (
    "hidden",
    "normed",
    "layers",
    "heads",
    "rotary",
    "expert_inner",
    "vocab",
    "latent_rank",
    "query_rank",
    "nope",
    "value",
    "kept_layers",
    *(f"delta_{word}" for word in ("layers", "heads", "group", "key", "value", "kernel")),
    *("inputs", "inputs_vocab", "streams", "low_rank"),
)
_TRAITS = (
    "kept",
    "activation",
    "gated",
    "parallel",
    "layer_norm",
    "norm_sublayers",
    "norm_all_heads",
    "norm_turned_heads",
    "l2_norm_heads",
    "gated_attention",
    "rope_interleaved",
    "norm_values",
    "norm_experts",
    "experts",
    "chosen",
    "renormalize",
    "sigmoid",
    "groups",
    "chosen_groups",
    "group_best",
    "scales_inputs",
    "growth_length",
    "growth_first",
    "grows_unturned",
)
SCALES = (
    *("epsilon", "embedding_scale", "residual_scale", "logits_scale", "logits_cap"),
    *("share_scale", "mixer_epsilon", "growth_beta", "clip", "swiglu_limit", "swiglu_alpha"),
)
_ROOM = ("num_blocks", "block_size", "num_slots", "max_tokens", "threads")
_INTS = (*_SIZES, *_ROOM, *_TRAITS)
FORMS = ("bf16", "int4", "int8", "e4m3")
INPUTS = ("bf16", "bytes", "e4m3", "e4m3_by_row", "fine_bytes")
_ARRAYS = ("token_ids", "count", "start", "rope", "slot", "table_offset", "tables")
DELTA_ARRAYS = ("filter", "speed", "bias", "norm")  # of linear attention
STREAM_ARRAYS = ("router", "predictions", "corrections", "scale")  # of residual streams


class Shape(ctypes.Structure):
    """native/shape.h's Shape: the model's sizes, and the room that it gets."""

    _fields_ = [
        *((name, c_int) for name in _INTS),
        *((name, c_float) for name in SCALES),
    ]


class NativeLayer(ctypes.Structure):
    """native/shape.h's LayerShape."""

    _fields_ = [
        *((name, c_int) for name in ("gates", "place", "head_size", "kv_heads")),
        ("cutoff", c_float),
    ]


class NativeStep(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("chunks", "tokens")),
        *((name, c_void_p) for name in _ARRAYS),
    ]


class NativeLinear(ctypes.Structure):
    """native/linear.h's Linear."""

    _fields_ = [
        *((name, c_int) for name in ("form", "inputs", "out", "group", "input", "narrow")),
        *((name, c_void_p) for name in PARTS),
    ]


def native_layer(shape: LayerShape) -> NativeLayer:
    """As the library is told of it."""
    *sizes, cutoff = msgspec.structs.astuple(shape)
    return NativeLayer(*sizes, -math.inf if cutoff is None else cutoff)


def norm_size(shape: Shape | Network, layer: LayerShape, name: str) -> int:
    """The numbers of a layer's norm of NORMS, or of FINAL_NORM."""
    heads = (shape.heads, layer.kv_heads) if shape.norm_all_heads else (1, 1)
    sizes = (*(layer.head_size * each for each in heads), shape.query_rank, shape.latent_rank)
    return dict(zip(NORMS[4:8], sizes, strict=True)).get(name, shape.hidden)


def input_sizes(shape: Shape | Network) -> dict[str, int]:
    """The numbers of what makes layers' inputs: each layer's in whole vectors."""
    wide = shape.inputs + -shape.inputs % LANES
    return {"table": shape.inputs_vocab * shape.layers * wide, "norm": wide}


def delta_sizes(shape: Shape | Network) -> dict[str, int]:
    """The numbers of each of DELTA_ARRAYS."""
    mixed = 2 * shape.delta_key + shape.delta_group * shape.delta_value
    heads = shape.delta_heads * shape.delta_group
    sizes = (shape.delta_heads * shape.delta_kernel * mixed, heads, heads, shape.delta_value)
    return dict(zip(DELTA_ARRAYS, sizes, strict=True))


def stream_sizes(shape: Shape | Network) -> dict[str, int]:
    """The numbers of each of STREAM_ARRAYS."""
    streams, hidden = shape.streams, shape.hidden
    sizes = (streams * hidden, streams**3, streams**2, hidden)
    return dict(zip(STREAM_ARRAYS, sizes, strict=True))


def num_alike(network: Network, name: str) -> int:
    """How many linears there are in the place of one of LINEARS, each like the others."""
    experts = network.mixture.experts if network.mixture else 0
    counts = {
        **dict.fromkeys(EXPERTS, experts),
        **dict.fromkeys(OF_HEADS, network.heads),
        **dict.fromkeys(OF_STREAMS, network.streams - 1),
    }
    return counts.get(name, 1)


def linear_bytes(shape: LinearShape) -> dict[str, int]:
    """The bytes of each of a linear's arrays, where it has them."""
    weights, groups = shape.inputs * shape.out, shape.inputs // shape.group if shape.group else 0
    return {
        "weight": weights * {"bf16": 4, "int8": 2, "e4m3": 2, "int4": 1}[shape.form] // 2,
        "scales": groups * shape.out * (2 if shape.narrow_scales else 4),
        "zeros": groups * shape.out * 4,
        "counts": weights // BYTES_PART.get(shape.input, 1) * 2,
        "bias": shape.out * 4,
        "factor": shape.inputs * 4,
    }

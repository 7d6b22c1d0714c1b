"""A checkpoint's `quantization_config` -> the format of its linears, or the reason against it.

Knows the keys that quantisers write; reads no tensor.
Source: transformers' AwqConfig, GPTQConfig, CompressedTensorsConfig; ModelOpt's
hf_quant_config.json; AutoGPTQ's quantize_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from enginehouse.build.sources.quantized_formats import (
    AwqFormat,
    Fp8Format,
    GptqFormat,
    LinearFormat,
    ModelOptInt4Format,
    PackedFormat,
)
from enginehouse.runtime.config import DTYPES
from enginehouse.runtime.errors import CheckpointError

GROUP_SIZES = (128, 64)
READABLE = (
    "AutoAWQ (gemm), GPTQ (4 bit, without act-order), compressed-tensors (FP8, W4A16) and "
    "ModelOpt (FP8, INT4 AWQ)"
)
_UNQUANTISED = "give the unquantised checkpoint and choose --quant"


class QuantizedLayout(NamedTuple):
    """How a checkpoint's linears are stored. group_size 0 for FP8.

    static_activations: its FP8 products round x with a scale that is in the checkpoint.
    pre_quant_scale: False when those that are stored are all ones.
    scale_dtype: of which every INT4 scale is a value, where that is not its dtype on disk.
    fp8_kv_cache: False when its scales of keys and values are of another cache than an FP8 one.
    """

    format: LinearFormat
    group_size: int = 0
    zero_point: bool = False
    static_activations: bool = False
    pre_quant_scale: bool = True
    scale_dtype: torch.dtype | None = None
    fp8_kv_cache: bool = True


def read_layout(config: Mapping[str, Any]) -> QuantizedLayout:
    """The layout that a quantization_config describes.

    Raises CheckpointError, with the reason, for a method or a variant that no engine can hold.
    """
    method = str(config.get("quant_method", "")).lower()
    if method == "awq":
        return _awq(config)
    if method in ("gptq", "gptqmodel"):
        return _gptq(config)
    if method == "compressed-tensors":
        return _compressed_tensors(config)._replace(fp8_kv_cache=_says_fp8_kv(config))
    if method == "modelopt":
        return _modelopt(config)._replace(fp8_kv_cache=_says_fp8_kv(config))
    raise CheckpointError(
        f"config.json has quantization_config with quant_method={config.get('quant_method')!r}; "
        f"quantised checkpoints are read from {READABLE}: {_UNQUANTISED}"
    )


def _says_fp8_kv(config: Mapping[str, Any]) -> bool:
    """Whether the KV cache is FP8 by what the config says, or it says nothing."""
    algo, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    return (algo or scheme or "FP8") == "FP8"


def _refused(what: str, key: str, found: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{what} with {key}={found!r}; wanted {wanted}: {_UNQUANTISED}")


def _object(what: str, key: str, found: Any) -> dict[str, Any]:
    """An object, empty when it is absent."""
    if not isinstance(found or {}, dict):
        raise _refused(what, key, found, "a JSON object")
    return found or {}


def _group_size(what: str, found: Any) -> int:
    if found not in GROUP_SIZES:
        raise _refused(what, "group_size", found, "64 or 128, for which there are kernels")
    return int(found)


def _awq(config: Mapping[str, Any]) -> QuantizedLayout:
    what = "an AutoAWQ checkpoint"
    bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
    if bits != 4:
        raise _refused(what, "bits", bits, "4")
    if str(version).lower() != "gemm":
        raise _refused(what, "version", version, "'gemm', the layout that AutoAWQ stores")
    group_size = _group_size(what, config.get("group_size", config.get("q_group_size")))
    zero_point = bool(config.get("zero_point", True))
    return QuantizedLayout(AwqFormat(zero_point), group_size, zero_point)


def _gptq(config: Mapping[str, Any]) -> QuantizedLayout:
    what, bits = "a GPTQ checkpoint", config.get("bits")
    stored = config.get("checkpoint_format", config.get("format", "gptq"))
    if bits != 4:
        raise _refused(what, "bits", bits, "4")
    if stored not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise _refused(what, "checkpoint_format", stored, "'gptq' or 'gptq_v2'")
    group_size = _group_size(what, config.get("group_size"))
    symmetric = bool(config.get("sym", True))
    return QuantizedLayout(
        GptqFormat(group_size, symmetric, 1 if stored == "gptq" else 0), group_size, not symmetric
    )


def _compressed_tensors(config: Mapping[str, Any]) -> QuantizedLayout:
    what = "a compressed-tensors checkpoint"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        found = len(groups) if isinstance(groups, dict) else None
        raise _refused(what, "config_groups", found, "one scheme for all linears")
    if config.get("transform_config"):
        found = config["transform_config"]
        raise _refused(what, "transform_config", found, "none: rotations are no part of an engine")
    group = _object(what, "config_groups", next(iter(groups.values())))
    weights = _object(what, "weights", group.get("weights"))
    inputs = _object(what, "input_activations", group.get("input_activations"))
    kind, bits = weights.get("type"), weights.get("num_bits")
    strategy = weights.get("strategy")
    if kind == "float" and bits == 8:
        if strategy not in ("tensor", "channel"):
            raise _refused(what, "strategy", strategy, "'tensor' or 'channel' for FP8 weights")
        if not inputs or inputs.get("type") != "float" or inputs.get("num_bits") != 8:
            raise _refused(what, "input_activations", inputs, "FP8 too, as FP8 kernels have it")
        return QuantizedLayout(Fp8Format(), static_activations=not inputs.get("dynamic"))
    if kind == "int" and bits == 4 and not inputs:
        if strategy != "group" or config.get("format") != "pack-quantized":
            both = f"{strategy}, {config.get('format')}"
            raise _refused(what, "strategy, format", both, "'group' and 'pack-quantized'")
        group_size = _group_size(what, weights.get("group_size"))
        symmetric = bool(weights.get("symmetric", True))
        return QuantizedLayout(PackedFormat(group_size, symmetric), group_size, not symmetric)
    scheme = f"{kind} {bits} bit, activations {'quantised' if inputs else 'not quantised'}"
    raise _refused(what, "weights", scheme, "FP8 with FP8 activations, or 4 bit integers alone")


def _modelopt(config: Mapping[str, Any]) -> QuantizedLayout:
    what, algo = "a ModelOpt checkpoint", config.get("quant_algo")
    if algo == "FP8":
        return QuantizedLayout(Fp8Format(), static_activations=True)
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return QuantizedLayout(Fp8Format())
    if algo == "W4A16_AWQ":
        if config.get("has_zero_point"):
            raise _refused(what, "has_zero_point", True, "false, as ModelOpt's INT4 AWQ has it")
        group_size = config.get("group_size")
        if group_size is None:  # in config.json it stands in the scheme of the weights
            schemes = list(_object(what, "config_groups", config.get("config_groups")).values())
            scheme = _object(what, "config_groups", schemes[0] if schemes else None)
            group_size = _object(what, "weights", scheme.get("weights")).get("group_size", 128)
        word = _object(what, "producer", config.get("producer")).get("weight_scale_dtype")
        if word not in (None, *DTYPES):
            raise _refused(what, "weight_scale_dtype", word, f"one of {', '.join(DTYPES)}")
        return QuantizedLayout(
            ModelOptInt4Format(),
            _group_size(what, group_size),
            pre_quant_scale=bool(config.get("pre_quant_scale", True)),
            scale_dtype=getattr(torch, word) if word else None,
        )
    raise _refused(what, "quant_algo", algo, "FP8, FP8_PER_CHANNEL_PER_TOKEN or W4A16_AWQ")

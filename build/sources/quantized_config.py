"""A checkpoint's `quantization_config` -> the format of its linears, or the reason against it.

Knows the keys that quantisers write; reads no tensor.
Source: transformers' AwqConfig, GPTQConfig, CompressedTensorsConfig, FineGrainedFP8Config,
FbgemmFp8Config, AutoRoundConfig; AutoFP8's save_quantized_model; auto-round's export_to_autoround;
ModelOpt's hf_quant_config.json; AutoGPTQ's quantize_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from enginehouse.build.forms.weight_forms import GROUP_SIZES as FORM_GROUPS
from enginehouse.build.hf_keys.config_values import read_json
from enginehouse.build.sources.quantized_formats import (
    AwqFormat,
    AwqGemvFormat,
    GptqFormat,
    LinearFormat,
    ModelOptInt4Format,
    ModelOptW4A8Format,
    PackedFormat,
)
from enginehouse.build.sources.quantized_rows import Fp8Format, Int8Format
from enginehouse.runtime.config import DTYPES
from enginehouse.runtime.errors import CheckpointError

GROUP_SIZES = (128, 64)
W4A8_GROUPS = FORM_GROUPS["w4a8_awq"]
READABLE = (
    "AutoAWQ (gemm, gemv), GPTQ (4 bit, without act-order), AutoRound (packed as either), "
    "compressed-tensors (FP8, W4A16, INT8), ModelOpt (FP8, INT4 AWQ, W4A8 AWQ, INT8), fp8 (a scale "
    "for each tensor) and fbgemm_fp8"
)

# Where config.json says how the weights are quantised; the second is compressed-tensors' of old.
CONFIG_KEYS = ("quantization_config", "compression_config")
# Files beside config.json that say how the weights are quantised, and the method of each.
CONFIG_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
_LEFT_OUT_KEYS = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
# The spellings of FP8's scales, all of them multipliers: transformers' for one of a tensor,
# AutoFP8's before 0.5, Mistral's own.
FP8_SPELLINGS = {
    "weight_scale_inv": "weight_scale",
    "qscale_weight": "weight_scale",
    "activation_scale": "input_scale",
    "act_scale": "input_scale",
    "qscale_act": "input_scale",
}
# What AutoRound packs as GPTQ does, by the word of packing_format after `auto_round:`, and what it
# takes from a stored zero point (GptqFormat).
AUTOROUND_GPTQ = {"auto_gptq": 1, "gptq": 1, "": 0, "gptqmodel": 0, "exllamav2": 0, "tritonv2": 0}


class QuantizedLayout(NamedTuple):
    """How a checkpoint's linears are stored. group_size 0 for FP8.

    static_activations: its FP8 products round x with a scale that is in the checkpoint.
    pre_quant_scale: False when those that are stored are all ones.
    scale_dtype: of which every INT4 scale is a value, where that is not its dtype on disk.
    fp8_kv_cache: False when its scales of keys and values are of another cache than an FP8 one.
    spellings: of the last word of tensors' names, on disk and as the format has it.
    """

    format: LinearFormat
    group_size: int = 0
    zero_point: bool = False
    static_activations: bool = False
    pre_quant_scale: bool = True
    scale_dtype: torch.dtype | None = None
    fp8_kv_cache: bool = True
    spellings: Mapping[str, str] = {}

    def spelt(self, name: str) -> str:
        """A tensor's name as the format has it."""
        return respelt(self.spellings)(name)


def quantization_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the checkpoint's files say of its quantisation, its method settled; None where they say
    nothing.
    """
    said = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    found = said if isinstance(said, dict) else {}
    method = found.get("quant_method") or _method(found)
    if found and method not in (None, "modelopt"):
        return {**found, "quant_method": method}
    for name, own_method in CONFIG_FILES.items():
        if (path / name).exists():
            data = read_json(path / name)
            own = data.get("quantization", data)
            if not isinstance(own, dict):
                raise CheckpointError(
                    f"{path / name} has quantization={own!r}; wanted a JSON object: download the "
                    "file again"
                )
            return {"quant_method": own_method, "producer": data.get("producer"), **own}
    return {**found, "quant_method": method} if found else None


def _method(config: Mapping[str, Any]) -> str | None:
    """The quant_method of a config that has none: ModelOpt 0.31's, and bitsandbytes' first."""
    if "quant_algo" in config:
        return "modelopt"
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return None


def says_unquantised(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that the weights are not: ModelOpt's `quant_algo: null`,
    compressed-tensors' empty `config_groups`. It may still speak of the KV cache.
    """
    known = config.get("quant_method") in ("modelopt", "compressed-tensors")
    return known and config.get("quant_algo") is None and not config.get("config_groups")


def read_layout(config: Mapping[str, Any]) -> QuantizedLayout:
    """The layout that a quantization_config describes.

    Raises CheckpointError, with the reason and without a remedy, for a method or a variant that no
    engine can hold.
    """
    method = str(config.get("quant_method", "")).lower()
    if method == "awq":
        return _awq(config)
    if method in ("gptq", "gptqmodel"):
        return _gptq(config)
    if method in ("auto-round", "intel/auto-round"):
        return _autoround(config)
    if method == "fbgemm_fp8":
        return QuantizedLayout(Fp8Format())
    readers = {"compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "fp8": _fp8}
    if method in readers:
        return readers[method](config)._replace(fp8_kv_cache=says_fp8_kv(config) is not False)
    raise CheckpointError(
        f"config.json has quantization_config with quant_method={config.get('quant_method')!r}; "
        f"quantised checkpoints are read from {READABLE}"
    )


def says_fp8_kv(config: Mapping[str, Any]) -> bool | None:
    """Whether the KV cache is FP8 by what the config says; None where it says nothing."""
    algo, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    if scheme == "static":  # AutoFP8's word
        return True
    return None if not (algo or scheme) else (algo or scheme) == "FP8"


def left_out(config: Mapping[str, Any], module: str) -> bool:
    """Whether a config says that this module (`model.layers.0.mlp.up_proj`) was not quantised.

    Every quantiser has a key of its own for a list of names, parts of names, patterns with stars,
    or regular expressions.
    """
    patterns = [str(word) for key in _LEFT_OUT_KEYS for word in config.get(key) or ()]
    for key in ("extra_config", "dynamic"):
        for name, own in json_object("a checkpoint", key, config.get(key)).items():
            if str(name).startswith("-:"):
                patterns.append("re:" + str(name)[2:])
            elif isinstance(own, dict) and (own.get("bits") or 0) >= 16:
                patterns += [str(name), f"re:{name}"]
    return any(_names(pattern, module) for pattern in patterns)


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    return f".{pattern}." in f".{module}." or fnmatchcase(module, pattern)


def refused(what: str, key: str, found: object, wanted: str) -> CheckpointError:
    """A variant that is not read; who raises it to the user says what to do."""
    return CheckpointError(f"{what} with {key}={found!r}; wanted {wanted}")


def respelt(spellings: Mapping[str, str]) -> Callable[[str], str]:
    """A tensor's name with its last word as the format has it."""

    def spelt(name: str) -> str:
        module, _, word = name.rpartition(".")
        return f"{module}.{spellings[word]}" if word in spellings else name

    return spelt


def json_object(what: str, key: str, found: Any) -> dict[str, Any]:
    """An object, empty when it is absent."""
    if not isinstance(found or {}, dict):
        raise refused(what, key, found, "a JSON object")
    return found or {}


def _group_size(what: str, found: Any) -> int:
    if found not in GROUP_SIZES:
        raise refused(what, "group_size", found, "64 or 128, for which there are kernels")
    return int(found)


def _awq(config: Mapping[str, Any]) -> QuantizedLayout:
    what = "an AutoAWQ checkpoint"
    bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
    if bits != 4:
        raise refused(what, "bits", bits, "4")
    if str(version).lower() not in ("gemm", "gemv"):
        raise refused(what, "version", version, "'gemm' or 'gemv', layouts that AutoAWQ stores")
    group_size = _group_size(what, config.get("group_size", config.get("q_group_size")))
    zero_point = bool(config.get("zero_point", True))
    if str(version).lower() == "gemv":
        return QuantizedLayout(AwqGemvFormat(group_size, zero_point), group_size, zero_point)
    return QuantizedLayout(AwqFormat(zero_point), group_size, zero_point)


def _gptq(config: Mapping[str, Any]) -> QuantizedLayout:
    what, bits = "a GPTQ checkpoint", config.get("bits")
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    stored = config.get(key, "gptq")
    if bits != 4:
        raise refused(what, "bits", bits, "4")
    if config.get("is_marlin_format"):
        raise refused(
            what,
            "is_marlin_format",
            config["is_marlin_format"],
            "false: words in the order of the Marlin kernel are not read, only those that GPTQ "
            "itself stores",
        )
    if stored not in ("gptq", "gptq_v2"):
        raise refused(what, key, stored, "'gptq' or 'gptq_v2'")
    _check_layers(what, "dynamic", config)
    group_size = _group_size(what, config.get("group_size"))
    symmetric = bool(config.get("sym", True))
    return QuantizedLayout(
        GptqFormat(group_size, symmetric, 1 if stored == "gptq" else 0), group_size, not symmetric
    )


def _autoround(config: Mapping[str, Any]) -> QuantizedLayout:
    what, bits = "an AutoRound checkpoint", config.get("bits")
    # before 0.3 the packing stood under `backend`
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:gptq")
    _, _, packed = packing.partition(":")
    first = packed.partition(":")[0]
    if bits != 4:
        raise refused(what, "bits", bits, "4")
    if config.get("data_type") not in (None, "int"):
        raise refused(what, "data_type", config["data_type"], "'int'")
    if (config.get("act_bits") or 16) < 16:
        raise refused(what, "act_bits", config["act_bits"], "16: INT4 weights alone")
    if config.get("rotation_config"):
        found = config["rotation_config"]
        raise refused(what, "rotation_config", found, "none: rotations are no part of an engine")
    _check_layers(what, "extra_config", config)
    group_size = _group_size(what, config.get("group_size"))
    symmetric = bool(config.get("sym", True))
    if first in ("auto_awq", "awq"):
        return QuantizedLayout(AwqFormat(not symmetric), group_size, not symmetric)
    if not packing.startswith("auto") or first not in AUTOROUND_GPTQ:
        wanted = "'auto_round:auto_gptq' or 'auto_round:auto_awq'"
        raise refused(what, "packing_format", packing, wanted)
    form = GptqFormat(group_size, symmetric, AUTOROUND_GPTQ[first])
    return QuantizedLayout(form, group_size, not symmetric)


def _check_layers(what: str, key: str, config: Mapping[str, Any]) -> None:
    """Modules with settings of their own have the same as all others, or are left out (16 bits)."""
    for module, own in json_object(what, key, config.get(key)).items():
        if str(module).startswith("-:"):  # GPTQModel's word for a module that is left out
            continue
        settings = json_object(what, f"{key}[{module!r}]", own)
        bits = settings.get("bits")
        if isinstance(bits, int) and bits >= 16:
            continue
        for name in ("bits", "group_size", "sym", "data_type", "desc_act"):
            wanted = config.get(name)
            if settings.get(name) is not None and wanted is not None and settings[name] != wanted:
                found = f"{key}[{module!r}][{name!r}]"
                raise refused(what, found, settings[name], f"{wanted!r}, as all others have")


def _fp8(config: Mapping[str, Any]) -> QuantizedLayout:
    """AutoFP8's, vLLM's and transformers' `fp8`; which modules were left out is found from the
    tensors.
    """
    what, scheme = "an fp8 checkpoint", config.get("activation_scheme", "dynamic")
    if config.get("weight_block_size"):
        size = config["weight_block_size"]
        wanted = "none: TensorRT-LLM has no kernel for blocks of FP8"
        raise refused(what, "weight_block_size", size, wanted)
    if scheme not in ("static", "dynamic"):
        raise refused(what, "activation_scheme", scheme, "'static' or 'dynamic'")
    static = scheme == "static"
    return QuantizedLayout(Fp8Format(), static_activations=static, spellings=FP8_SPELLINGS)


def _compressed_tensors(config: Mapping[str, Any]) -> QuantizedLayout:
    what = "a compressed-tensors checkpoint"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        found = len(groups) if isinstance(groups, dict) else None
        raise refused(what, "config_groups", found, "one scheme for all linears")
    if config.get("transform_config"):
        found = config["transform_config"]
        raise refused(what, "transform_config", found, "none: rotations are no part of an engine")
    group = json_object(what, "config_groups", next(iter(groups.values())))
    weights = json_object(what, "weights", group.get("weights"))
    inputs = json_object(what, "input_activations", group.get("input_activations"))
    kind, bits = weights.get("type"), weights.get("num_bits")
    strategy = weights.get("strategy")
    if kind == "float" and bits == 8:
        if strategy not in ("tensor", "channel"):
            raise refused(what, "strategy", strategy, "'tensor' or 'channel' for FP8 weights")
        if not inputs or inputs.get("type") != "float" or inputs.get("num_bits") != 8:
            raise refused(what, "input_activations", inputs, "FP8 too, as FP8 kernels have it")
        return QuantizedLayout(Fp8Format(), static_activations=not inputs.get("dynamic"))
    if kind == "int" and bits == 4 and not inputs:
        if strategy != "group" or config.get("format") != "pack-quantized":
            both = f"{strategy}, {config.get('format')}"
            raise refused(what, "strategy, format", both, "'group' and 'pack-quantized'")
        group_size = _group_size(what, weights.get("group_size"))
        symmetric = bool(weights.get("symmetric", True))
        return QuantizedLayout(PackedFormat(group_size, symmetric), group_size, not symmetric)
    stored = group.get("format") or config.get("format")
    if kind == "int" and bits == 8 and stored in ("int-quantized", "naive-quantized"):
        if strategy not in ("tensor", "channel"):
            raise refused(what, "strategy", strategy, "'tensor' or 'channel' for INT8 weights")
        if not weights.get("symmetric", True):
            raise refused(what, "symmetric", False, "true, as the engine's INT8 has no zero points")
        return QuantizedLayout(Int8Format())
    scheme = f"{kind} {bits} bit, activations {'quantised' if inputs else 'not quantised'}"
    wanted = "FP8 with FP8 activations, 4 bit integers alone, or 8 bit integers (int-quantized)"
    raise refused(what, "weights", scheme, wanted)


def _modelopt(config: Mapping[str, Any]) -> QuantizedLayout:
    what, algo = "a ModelOpt checkpoint", config.get("quant_algo")
    if algo == "FP8":
        return QuantizedLayout(Fp8Format(), static_activations=True)
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return QuantizedLayout(Fp8Format())
    if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        return QuantizedLayout(Int8Format())
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        if config.get("has_zero_point"):
            raise refused(what, "has_zero_point", True, "false, as ModelOpt's INT4 AWQ has it")
        word = json_object(what, "producer", config.get("producer")).get("weight_scale_dtype")
        if word not in (None, *DTYPES):
            raise refused(what, "weight_scale_dtype", word, f"one of {', '.join(DTYPES)}")
        group_size = _group_size(what, modelopt_group_size(config))
        if algo == "W4A8_AWQ" and group_size not in W4A8_GROUPS:
            raise refused(what, "group_size", group_size, "128, for which W4A8 has a kernel")
        return QuantizedLayout(
            ModelOptInt4Format() if algo == "W4A16_AWQ" else ModelOptW4A8Format(),
            group_size,
            static_activations=algo == "W4A8_AWQ",
            pre_quant_scale=bool(config.get("pre_quant_scale", True)),
            scale_dtype=getattr(torch, word) if word else None,
        )
    wanted = "FP8, FP8_PER_CHANNEL_PER_TOKEN, W4A16_AWQ, W4A8_AWQ, W8A16 or W8A8_SQ_PER_CHANNEL"
    raise refused(what, "quant_algo", algo, wanted)


def modelopt_group_size(config: Mapping[str, Any]) -> Any:
    """ModelOpt's group size; in config.json it stands in the scheme of the weights."""
    if config.get("group_size") is not None:
        return config["group_size"]
    what = "a ModelOpt checkpoint"
    schemes = list(json_object(what, "config_groups", config.get("config_groups")).values())
    scheme = json_object(what, "config_groups", schemes[0] if schemes else None)
    return json_object(what, "weights", scheme.get("weights")).get("group_size", 128)

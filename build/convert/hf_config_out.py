"""config.json and hf_quant_config.json of a quantised Hugging Face checkpoint.

The words are ModelOpt's; those that it has no word for stand under `producer`, where no loader
looks. Knows no tensor.
Source: nvidia-modelopt 0.47, torch/export/quant_utils.py and convert_hf_config.py.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.hf_layout import HfLayout
from enginehouse.build.source import SourceCheckpoint

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_INT4_ALGOS = ("W4A16_AWQ", "W4A8_AWQ")


class QuantizationFiles(NamedTuple):
    """file: the whole of hf_quant_config.json. inline: config.json's quantization_config."""

    file: dict[str, Any]
    inline: dict[str, Any]


def hf_config(plan: BuildPlan, source: SourceCheckpoint) -> dict[str, Any]:
    """The source's config.json for weights in the plan's dtype, without the model's Python code."""
    config = {key: value for key, value in source.config.items() if key != "auto_map"}
    keys = ("dtype", "torch_dtype") if "dtype" in config else ("torch_dtype",)
    return config | dict.fromkeys(keys, plan.config.dtype)


def quantization_files(plan: BuildPlan) -> QuantizationFiles | None:
    """How the weights are quantised, or None when they are not.

    Beside ModelOpt's keys, `inline` repeats the group size, and `producer` says of which dtype
    every INT4 scale is a value (they are stored as float32).
    """
    quantization = plan.config.quantization
    algo, kv_algo = quantization.quant_algo, quantization.kv_cache_quant_algo
    if algo is None:
        return None
    producer = {"name": "enginehouse", "version": version("enginehouse")}
    groups: dict[str, Any] = {}
    if algo in _INT4_ALGOS:
        producer["weight_scale_dtype"] = plan.scale_dtype or plan.config.dtype
        groups = {
            "group_size": quantization.group_size,
            "has_zero_point": False,
            "pre_quant_scale": quantization.pre_quant_scale,
        }
    excluded = HfLayout(plan.config).unquantized_modules()
    words = {"quant_algo": algo, "kv_cache_quant_algo": kv_algo, **groups}
    file = {"producer": producer, "quantization": {**words, "exclude_modules": excluded}}
    inline: dict[str, Any] = {"ignore": excluded, "quant_algo": algo, **groups}
    if algo == "FP8":
        scheme = {"input_activations": _FP8, "weights": _FP8, "targets": ["Linear"]}
        inline["config_groups"] = {"group_0": scheme}
    if kv_algo == "FP8":
        inline["kv_cache_scheme"] = _FP8
    return QuantizationFiles(file, {**inline, "producer": producer, "quant_method": "modelopt"})

"""config.json and hf_quant_config.json of a quantised Hugging Face checkpoint.

The words are those of the layout's own quantisers; what they have no word for stands under
`producer`, where no loader looks. Knows no tensor.
Source: nvidia-modelopt 0.47, torch/export/quant_utils.py and convert_hf_config.py;
compressed-tensors 0.20, quantization/quant_scheme.py; transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from enginehouse.build.forms.block_floats import FP8_BLOCK
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.hf_layout import HfLayout
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.config import QuantConfig

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
# ModelOpt's schemes for all linears, which it writes for these forms alone.
_MODELOPT_SCHEMES: dict[str | None, dict[str, Any]] = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
    "W4A16_NVFP4": {"weights": _FP4},
}
_INT4_ALGOS = ("W4A16_AWQ", "W4A8_AWQ")


class QuantizationFiles(NamedTuple):
    """file: the whole of hf_quant_config.json, where the layout has one. inline: config.json's
    quantization_config.
    """

    file: dict[str, Any] | None
    inline: dict[str, Any]


def hf_config(plan: BuildPlan, source: SourceCheckpoint) -> dict[str, Any]:
    """The source's config.json for weights in the plan's dtype, without the model's Python code."""
    config = {key: value for key, value in source.config.items() if key != "auto_map"}
    keys = ("dtype", "torch_dtype") if "dtype" in config else ("torch_dtype",)
    return config | dict.fromkeys(keys, plan.config.dtype)


def quantization_files(plan: BuildPlan) -> QuantizationFiles | None:
    """How the weights are quantised, or None when they are not."""
    algo = plan.config.quantization.quant_algo
    if algo is None:
        return None
    layout = HfLayout(plan.config, plan.settings.layout)
    excluded, mixed = layout.unquantized_modules(), layout.quantized_modules()
    if plan.settings.layout == "compressed_tensors":
        inline = _compressed_tensors(plan.config.quantization, excluded, _by_form(mixed))
        return QuantizationFiles(None, inline)
    if algo == "FP8_PB_WO":
        return QuantizationFiles(None, _fine_grained_fp8(excluded))
    files = _modelopt(plan, excluded)
    return _with_layers(files, mixed) if mixed else files


def _producer() -> dict[str, Any]:
    return {"name": "enginehouse", "version": version("enginehouse")}


def _modelopt(plan: BuildPlan, excluded: list[str]) -> QuantizationFiles:
    """Beside ModelOpt's keys, `inline` repeats the group size, and `producer` says of which dtype
    every INT4 scale is a value (they are stored as float32).
    """
    quantization = plan.config.quantization
    algo, kv_algo = quantization.quant_algo, quantization.kv_cache_quant_algo
    producer = _producer()
    groups: dict[str, Any] = {}
    if algo in _INT4_ALGOS:
        producer["weight_scale_dtype"] = plan.scale_dtype or plan.config.dtype
        groups = {
            "group_size": quantization.group_size,
            "has_zero_point": False,
            "pre_quant_scale": quantization.pre_quant_scale,
        }
    elif algo in ("NVFP4", "W4A16_NVFP4", "MXFP8"):
        groups = {"group_size": quantization.group_size}
    words = {"quant_algo": algo, "kv_cache_quant_algo": kv_algo, **groups}
    file = {"producer": producer, "quantization": {**words, "exclude_modules": excluded}}
    inline: dict[str, Any] = {"ignore": excluded, "quant_algo": algo, **groups}
    if algo in _MODELOPT_SCHEMES:
        scheme = _MODELOPT_SCHEMES[algo]
        inline["config_groups"] = {"group_0": {**scheme, "targets": ["Linear"]}}
    if kv_algo == "FP8":
        inline["kv_cache_scheme"] = _FP8
    return QuantizationFiles(file, {**inline, "producer": producer, "quant_method": "modelopt"})


def _by_form(mixed: Mapping[str, QuantConfig]) -> dict[QuantConfig, list[str]]:
    """The modules of each form, both in the order in which they first come."""
    found: dict[QuantConfig, list[str]] = {}
    for module, form in mixed.items():
        found.setdefault(form, []).append(module)
    return {form: sorted(modules) for form, modules in found.items()}


def _with_layers(files: QuantizationFiles, mixed: Mapping[str, QuantConfig]) -> QuantizationFiles:
    """MIXED_PRECISION's own: a form for each module, and schemes that name their modules."""
    layers: dict[str, dict[str, Any]] = {
        module: {"quant_algo": form.quant_algo}
        | ({} if form.quant_algo == "FP8" else {"group_size": form.group_size})
        for module, form in mixed.items()
    }
    groups = {
        f"group_{i}": {**_MODELOPT_SCHEMES[form.quant_algo], "targets": modules}
        for i, (form, modules) in enumerate(_by_form(mixed).items())
    }
    assert files.file is not None
    quantization = {**files.file["quantization"], "quantized_layers": layers}
    file = {**files.file, "quantization": quantization}
    return QuantizationFiles(
        file, {**files.inline, "config_groups": groups, "quantized_layers": layers}
    )


def _fine_grained_fp8(excluded: list[str]) -> dict[str, Any]:
    """transformers' words for blocks of FP8, which DeepSeek's and Qwen's checkpoints have too."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": excluded,
        "producer": _producer(),
        "quant_method": "fp8",
        "weight_block_size": list(FP8_BLOCK),
    }


def _compressed_tensors(
    quantization: QuantConfig, excluded: list[str], mixed: Mapping[QuantConfig, list[str]]
) -> dict[str, Any]:
    kv_scheme = None
    if quantization.kv_cache_quant_algo == "FP8":
        kv_scheme = {**_args(8, "tensor"), "dynamic": False}
    groups = [
        {"targets": modules, **_compressed_scheme(form)}
        for form, modules in (mixed or {quantization: ["Linear"]}).items()
    ]
    formats = {str(group["format"]) for group in groups}
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": excluded,
        "kv_cache_scheme": kv_scheme,
        "producer": _producer(),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _args(num_bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    kind = {"num_bits": num_bits, "type": "float", "symmetric": True, "strategy": strategy}
    return {**kind, "dynamic": False, **more}


def _compressed_scheme(quantization: QuantConfig) -> dict[str, Any]:
    """What one form's linears have: `weights`, `input_activations`, `format`."""
    algo, inputs = quantization.quant_algo, None
    if algo in ("NVFP4", "W4A16_NVFP4"):
        name = "nvfp4-pack-quantized"
        block = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        weights = _args(4, "tensor_group", **block)
        if algo == "NVFP4":
            inputs = {**weights, "dynamic": "local"}
    elif algo == "MXFP8":
        name = "mxfp8-quantized"
        weights = _args(8, "group", group_size=32, scale_dtype="torch.uint8")
        inputs = {**weights, "dynamic": True}
    elif algo == "W4A16_AWQ":
        name = "pack-quantized"
        weights = _args(4, "group", type="int", group_size=quantization.group_size)
    else:
        name = "float-quantized"
        weights, inputs = {
            "FP8": (_args(8, "tensor"), _args(8, "tensor")),
            "FP8_PER_CHANNEL_PER_TOKEN": (_args(8, "channel"), _args(8, "token", dynamic=True)),
            "FP8_PB_WO": (
                _args(8, "block", block_structure=list(FP8_BLOCK)),
                _args(8, "group", group_size=FP8_BLOCK[1], dynamic=True),
            ),
        }[str(algo)]
    return {"weights": weights, "input_activations": inputs, "format": name}

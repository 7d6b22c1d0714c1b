"""YAML and flags become settings: every choice, with its default and its doc line, once.

Knows no source and no model: whether the choices go together is `build_plan.py`'s business.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from enginehouse.build.forms.capabilities import GPU_SM
from enginehouse.build.forms.weight_forms import EXPORT_CONFIGS, KV_CACHE_ALGOS, QUANT_CONFIGS
from enginehouse.runtime.config import DTYPES
from enginehouse.runtime.cpu.support import ACTIVATIONS
from enginehouse.runtime.errors import PlanError

FORMATS = ("trtllm", "hf")
LAYOUTS = ("modelopt", "compressed_tensors")
STAGES = ("plan", "convert", "compile", "verify")


def _choice(
    default: Any, doc: str, *, choices: tuple[str, ...] | None = None, minimum: float = 1
) -> Any:
    metadata = {"doc": doc, "choices": choices, "minimum": minimum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Everything that can be chosen about a build. Field metadata: doc, choices, minimum."""

    model: str | None = _choice(
        None,
        "directory, .gguf file or hub id (owner/name, owner/name@revision); without it, the "
        "sample model",
    )
    output: str | None = _choice(None, "engine directory; without it, engines/NAME-QUANT")
    name: str | None = _choice(None, "the name clients ask for; without it, the source's")
    tokenizer: str | None = _choice(
        None, "directory of the tokenizer; without it, the source's own"
    )
    quant: str = _choice(
        "auto",
        "form of the weights; auto is the source's own, none for an unquantised one; the last "
        "ones with format=hf only",
        choices=("auto", *QUANT_CONFIGS, *EXPORT_CONFIGS),
    )
    dequantize: bool = _choice(
        False,
        "a quantised checkpoint is a source of every quant; the plan says what is rounded twice",
    )
    group_size: int | None = _choice(
        None, "int4 forms: inputs per scale, 128 or 64; without it, the largest legal"
    )
    format: str = _choice(
        "trtllm",
        "what is written: a TensorRT-LLM checkpoint, or a quantised Hugging Face one",
        choices=FORMATS,
    )
    layout: str = _choice(
        "modelopt",
        "format=hf: whose names the scales have",
        choices=LAYOUTS,
    )
    effective_bits: float | None = _choice(
        None, "mixed: bits a weight, scales included, that the linears may take in the mean"
    )
    max_kl: float | None = _choice(
        None, "mixed: nats a token that they may lose, each alone and added up", minimum=0
    )
    mixed_forms: str = _choice(
        "nvfp4,fp8", "mixed: what a linear may be, beside unquantised: nvfp4, w4a16_nvfp4, fp8"
    )
    kv_cache_dtype: str = _choice(
        "auto",
        "dtype of the KV cache; auto is the model's, or fp8 with the scales that an FP8 source has",
        choices=tuple(KV_CACHE_ALGOS),
    )
    exclude: str | None = _choice(
        None, "modules to leave unquantised: patterns such as *mlp.proj, separated by commas"
    )
    ignore_tensors: str | None = _choice(
        None, "tensors to pass over that no engine reads: patterns such as mtp.*, by commas"
    )
    gpu: str | None = _choice(
        None, "the GPU that will serve; what it cannot run is refused", choices=tuple(GPU_SM)
    )
    sm: str | None = _choice(
        None, "tensorrt: the SMs to compile for, say 86,89,120; without it and gpu, all that can"
    )
    plan_layers: int | None = _choice(
        None, "tensorrt: layers in one plan; without it, all of them up to 32, else at most 10"
    )
    bake_weights: bool = _choice(
        False, "tensorrt: weights as constants of the plans, which each rank then has its own of"
    )
    tp: int = _choice(1, "tensor parallel GPUs")
    pad: bool = _choice(
        True, "heads and MLP columns that tp or the form does not divide are padded with zeros"
    )
    pp: int = _choice(1, "pipeline parallel stages")
    backend: str = _choice(
        "auto",
        "what runs the engine; auto is cpu where its kernels run the model on this machine, else "
        "torch",
        choices=("auto", "cpu", "torch", "tensorrt", "tensorrt_llm"),
    )
    dtype: str = _choice(
        "auto", "dtype of what is not quantised; auto is the source's", choices=("auto", *DTYPES)
    )
    max_seq_len: int | None = _choice(
        None, "prompt and answer together, tokens; without it, the model's limit", minimum=16
    )
    max_batch_size: int = _choice(64, "sequences in flight")
    max_num_tokens: int | None = _choice(
        None,
        "tokens computed in one iteration; without it, torch and cpu 512, tensorrt 2048, else 8192",
    )
    kv_block_size: int = _choice(32, "tokens in one KV cache block, a power of two")
    kv_cache_gib: float | None = _choice(
        None, "KV cache, GiB; without it, chosen at start", minimum=0.001
    )
    compute_dtype: str = _choice(
        "auto", "torch backend: dtype of arithmetic", choices=("auto", "float32", "bfloat16")
    )
    cpu_activations: str = _choice(
        "int8",
        "cpu backend: what enters products of INT4 and INT8, in bytes (faster) or in bfloat16",
        choices=ACTIVATIONS,
    )
    calib_samples: int = _choice(16, "fp8, awq, KV cache: calibration texts")
    calib_length: int = _choice(512, "fp8, awq, KV cache: tokens of each text", minimum=16)
    verify_with: str = _choice(
        "reference",
        "what the engine is compared with: our reading of the source, or transformers' own",
        choices=("reference", "transformers"),
    )
    verify_max_mean_kl: float | None = _choice(
        None, "mean KL divergence that fails a build; without it, by quant", minimum=0
    )
    price_input: float | None = _choice(
        None, "dollars per million prompt tokens; without it, the server's", minimum=0
    )
    price_output: float | None = _choice(
        None, "dollars per million generated tokens; without it, the server's", minimum=0
    )
    tool_format: str = _choice(
        "auto",
        "how the model writes calls of tools; auto is what its chat template shows",
        choices=(
            *("auto", "none", "llama3_json", "llama_pythonic", "hermes", "nemotron", "mistral"),
            *("json", "qwen3_coder", "harmony", "deepseek_v3", "deepseek_v31", "glm45", "kimi_k2"),
            *("granite", "command", "minimax_m2", "seed_oss", "phi4_mini", "glm4", "lfm2"),
            "hunyuan",
        ),
    )
    reasoning_format: str = _choice(
        "auto",
        "the marks of reasoning at the head of answers; auto is what the chat template shows",
        choices=(
            *("auto", "none", "granite", "hunyuan", "think", "magistral", "seed_oss", "command"),
            "harmony",
        ),
    )
    workers: int = _choice(1, "tensorrt_llm: ranks compiled at once, each on a GPU of its own")
    trtllm_build: dict[str, Any] | None = _choice(
        None, "tensorrt_llm: any further flag of trtllm-build, FLAG=VALUE; may be repeated"
    )
    until: str = _choice("verify", "the last stage to run", choices=STAGES)


# How help lists them: what most builds are told comes first.
GROUPS: dict[str, tuple[str, ...]] = {
    "first": ("model", "output", "quant", "tp", "backend"),
    "form of the weights and of the KV cache": (
        *("dequantize", "group_size", "exclude", "dtype", "kv_cache_dtype", "format", "layout"),
        *("effective_bits", "max_kl", "mixed_forms", "calib_samples", "calib_length"),
    ),
    "GPUs": ("gpu", "pp", "pad"),
    "what the engine takes at once": (
        *("max_seq_len", "max_batch_size", "max_num_tokens", "kv_block_size", "kv_cache_gib"),
    ),
    "of one backend": (
        *(
            "cpu_activations",
            "compute_dtype",
            "sm",
            "plan_layers",
            "bake_weights",
            "workers",
            "trtllm_build",
        ),
    ),
    "what clients see": (
        *("name", "tokenizer", "tool_format", "reasoning_format", "price_input", "price_output"),
    ),
    "the build": ("until", "verify_with", "verify_max_mean_kl", "ignore_tensors"),
}


def load_settings(flags: AnyMapping[str, Any], config_file: Path | None = None) -> BuildSettings:
    """Defaults, overridden by the YAML file, overridden by flags (None: not given).

    Raises PlanError for an unknown key, a wrong type or value, and YAML that does not parse.
    """
    values = dict(_read_yaml(config_file)) if config_file is not None else {}
    for key, value in values.items():
        _check_value(key, value, f"{config_file}: ")
    for key, value in flags.items():
        if value is not None:
            _check_value(key, value, "")
            together = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if together else value
    return BuildSettings(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PlanError(f"{path} is not YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no day; too deep
        raise PlanError(f"{path} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds a {type(data).__name__}; wanted lines of `key: value`")
    return data


def _check_value(key: Any, value: Any, where: str) -> None:
    """PlanError unless `key` is a setting and `value` one it can have."""
    known = {item.name: item for item in fields(BuildSettings)}
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
        raise PlanError(f"{where}unknown key {key!r}; {hint}")
    setting = known[key]
    if value is None and setting.default is None:
        return
    kind = str(setting.type).removesuffix(" | None")
    legal: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    legal["bool"] = (bool,)
    right = isinstance(value, legal.get(kind, (dict,)))
    if not right or isinstance(value, bool) != (kind == "bool"):
        found = f"{type(value).__name__} {value!r}"
        wanted = kind if kind in legal else "a mapping of flags to values"
        raise PlanError(f"{where}{key} is {found}; wanted {wanted}")
    choices, minimum = setting.metadata["choices"], setting.metadata["minimum"]
    if choices and value not in choices:
        raise PlanError(f"{where}{key}={value!r} is not known; choose one of {', '.join(choices)}")
    if kind in ("int", "float") and not minimum <= value < float("inf"):
        raise PlanError(f"{where}{key}={value} is out of range; wanted {minimum} or more")

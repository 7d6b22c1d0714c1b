"""The flags of `trtllm-build`: what each may be, which must not meet, and those a build sets.

Knows no tensor and runs nothing. trtllm_build_flags.json holds names, types, defaults and choices.
Source: TensorRT-LLM 1.2.1, trtllm-build and PluginConfig.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from enginehouse.build.forms.capabilities import GPU_SM
from enginehouse.build.forms.weight_forms import FP8_FORMS, KV_CACHE_ALGOS
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import PlanError

FLAGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("trtllm_build_flags.json").read_text(encoding="utf-8")
)
# Flags that would say a second time, and perhaps otherwise, what a setting says already.
_SETTINGS = {
    "max_seq_len": "max_seq_len",
    "max_input_len": "max_seq_len",
    "max_batch_size": "max_batch_size",
    "max_num_tokens": "max_num_tokens",
    "tokens_per_block": "kv_block_size",
    "workers": "workers",
    "output_dir": "output",
    "checkpoint_dir": "model",
}
_WANTED = {"int": "a number", "str": "a word", "list[str]": "words"}
_NO_ENGINE = ("dry_run", "model_config", "build_config", "model_cls_file", "model_cls_name")


class Facts(NamedTuple):
    """What decides whether a flag's value can work. sm: None when no GPU was named."""

    quant: str
    kv_cache_dtype: str
    tp: int
    pp: int
    architecture: str
    sm: int | None


def facts_of(quant: str, gpu: str | None, config: ModelConfig) -> Facts:
    """The facts of a build. config: the checkpoint's, with mapping and quantization."""
    kinds = {algo: kind for kind, algo in KV_CACHE_ALGOS.items()}
    return Facts(
        quant,
        kinds[config.quantization.kv_cache_quant_algo],
        config.mapping.tp_size,
        config.mapping.pp_size,
        config.architecture,
        None if gpu is None else GPU_SM[gpu],
    )


def _always(facts: Facts) -> bool:
    return True


def _not_fp8(facts: Facts) -> bool:
    return facts.quant != "fp8"


def _not_hopper(facts: Facts) -> bool:
    return facts.quant != "fp8" or facts.sm not in (None, 90)


def _no_fp8_attention(facts: Facts) -> bool:
    return facts.quant not in FP8_FORMS or facts.kv_cache_dtype != "fp8"


def _weight_only(facts: Facts) -> bool:
    return facts.quant not in ("none", *FP8_FORMS)


def _no_reduce_fusion(facts: Facts) -> bool:
    return facts.tp == 1 or facts.pp > 1 or facts.architecture != "LlamaForCausalLM"


class _Refusal(NamedTuple):
    """`flag` with one of `values` cannot work when `applies`."""

    flag: str
    values: tuple[str, ...]
    applies: Callable[[Facts], bool]
    reason: str


_IN_FLIGHT = "in-flight batching needs it as it is"
_REUSE = "block reuse and chunked prefill need it as it is"
_HOPPER = "its kernel is for quant=fp8 on SM90"
_REFUSALS = (
    _Refusal("kv_cache_type", ("continuous", "disabled"), _always, _IN_FLIGHT),
    _Refusal("paged_kv_cache", ("disable",), _always, _IN_FLIGHT),
    _Refusal("remove_input_padding", ("disable",), _always, _IN_FLIGHT),
    _Refusal("gpt_attention_plugin", ("disable",), _always, _IN_FLIGHT),
    _Refusal("context_fmha", ("disable",), _always, _IN_FLIGHT),
    _Refusal("use_paged_context_fmha", ("disable",), _always, _REUSE),
    _Refusal("strip_plan", ("enable",), _always, "an engine without its weights cannot be served"),
    _Refusal(
        "speculative_decoding_mode",
        ("medusa", "explicit_draft_tokens", "eagle"),
        _always,
        "the checkpoint has no draft heads",
    ),
    _Refusal("streamingllm", ("enable",), _always, "TensorRT-LLM 1.2.1 asserts it off"),
    _Refusal(
        "use_fp8_context_fmha",
        ("enable",),
        _no_fp8_attention,
        "it wants FP8 weights and an FP8 KV cache",
    ),
    _Refusal("gemm_plugin", ("fp8",), _not_fp8, "it wants quant=fp8"),
    _Refusal("gemm_plugin", ("nvfp4",), _always, "no form of ours is NVFP4"),
    _Refusal("gemm_swiglu_plugin", ("fp8",), _not_hopper, _HOPPER),
    _Refusal("low_latency_gemm_plugin", ("fp8",), _not_hopper, _HOPPER),
    _Refusal("low_latency_gemm_swiglu_plugin", ("fp8",), _not_hopper, _HOPPER),
    _Refusal("fast_build", ("enable",), _weight_only, "INT4 and INT8 weights need their plugin"),
    _Refusal("reduce_fusion", ("enable",), _no_reduce_fusion, "it wants tp > 1, pp = 1 and Llama"),
)


def check_flags(asked: Mapping[str, Any], facts: Facts) -> dict[str, str]:
    """What `trtllm_build:` asks for, as words of the command line; a flag alone is "enable".

    Raises PlanError for an unknown flag, a wrong value, and a combination that cannot work.
    """
    found = {}
    for given, value in asked.items():
        name = _known(str(given))
        word = _word(name, value)
        for refusal in _REFUSALS:
            if refusal.flag == name and word in refusal.values and refusal.applies(facts):
                raise PlanError(
                    f"trtllm_build: {name}={word} with quant={facts.quant}, kv_cache_dtype="
                    f"{facts.kv_cache_dtype}, tp={facts.tp}, pp={facts.pp} does not work: "
                    f"{refusal.reason}; leave it out"
                )
        if name in found:
            raise PlanError(f"trtllm_build: {name} is given twice; leave one out")
        found[name] = word
    return found


def _known(given: str) -> str:
    """The flag's own name; PlanError for what is no flag, or is not to be set this way."""
    name = given.removeprefix("--").replace("-", "_")
    for flag, facts in FLAGS.items():
        if f"--{name}" in facts.get("aliases", ()):
            name = flag
    if name in _SETTINGS:
        raise PlanError(f"trtllm_build: {given} is settled by {_SETTINGS[name]}; set that instead")
    if name in _NO_ENGINE:
        raise PlanError(f"trtllm_build: with {given} no engine comes of this checkpoint; leave it")
    if name not in FLAGS:
        near = difflib.get_close_matches(name, FLAGS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see `trtllm-build --help`"
        raise PlanError(f"trtllm_build: {given} is no flag of trtllm-build 1.2.1{hint}")
    return name


def _word(name: str, value: Any) -> str:
    """The value as trtllm-build reads it; PlanError for one it would refuse."""
    kind, choices = FLAGS[name]["type"], FLAGS[name].get("choices")
    if kind in ("flag", "enable|disable") or name == "paged_kv_cache":
        choices = ["enable", "disable"]
        if value in (True, "true"):
            value = "enable"
        elif value in (False, "false"):
            value = "disable"
    items = value if isinstance(value, (list, tuple)) else [value]
    if kind == "list[str]" and isinstance(value, str):
        items = value.split(",")
    word = ",".join(str(item) for item in items)
    wanted = ", ".join(choices) if choices else _WANTED[kind]
    if choices:
        legal = word in choices
    elif kind == "int":
        legal = re.fullmatch("[0-9]{1,9}", word) is not None
        legal = legal and (name != "max_beam_width" or int(word) > 0)
    else:
        legal = bool(items) and all(_is_word(item) for item in items)
        legal = legal and (len(items) == 1 if kind == "str" else word.count(",") == len(items) - 1)
    if not legal:
        raise PlanError(f"trtllm_build: {name}={value!r} is not legal; wanted {wanted}")
    return word


def _is_word(item: Any) -> bool:
    """Whether it can stand on a command line; with a dash first it would be read as a flag."""
    is_text = isinstance(item, (str, int, float)) and not isinstance(item, bool)
    return is_text and re.match(r"[^-\s]", str(item)) is not None


def command_words(flags: Mapping[str, str]) -> list[str]:
    """The command line's words for checked flags: `store_true` ones stand alone or are absent."""
    words: list[str] = []
    for name, word in flags.items():
        kind = FLAGS[name]["type"]
        if kind == "flag":
            words += [f"--{name}"] if word == "enable" else []
        elif kind == "list[str]":
            words += [f"--{name}", *word.split(",")]
        else:
            words += [f"--{name}", word]
    return words


def serving_flags(
    facts: Facts, max_seq_len: int, max_batch_size: int, max_num_tokens: int, kv_block_size: int
) -> dict[str, str]:
    """The flags of an engine that serves these limits with in-flight batching.

    max_input_len is max_seq_len: its default of 1024 would refuse longer prompts. FP8 leaves the
    GEMM plugin off, as TensorRT's own FP8 products are the faster ones. FP8 attention over the
    prompt wants an FP8 KV cache too; it is TensorRT-LLM's default, so it is switched off by name.
    """
    return {
        "max_seq_len": str(max_seq_len),
        "max_input_len": str(max_seq_len),
        "max_batch_size": str(max_batch_size),
        "max_num_tokens": str(max_num_tokens),
        "tokens_per_block": str(kv_block_size),
        "gemm_plugin": "disable" if facts.quant in FP8_FORMS else "auto",
        "gpt_attention_plugin": "auto",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "kv_cache_type": "paged",
        "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": "disable" if _no_fp8_attention(facts) else "enable",
    }

"""Settings and a source become a plan, checked in full.

A plan is legal by construction: what TensorRT-LLM or a kernel would refuse is refused before a
weight is read. This file knows shapes and sizes; it reads no weight and writes no file.
Source: TensorRT-LLM 1.2.1 checkpoint format, tensor tables per tp and pp.
"""

from __future__ import annotations

from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, replace
from math import prod

from enginehouse.build.families.architectures import architecture_of, stage_rows
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.families.shapes import check_tensors, expected_shapes
from enginehouse.build.forms.capabilities import check_gpu, kv_refusal, tensorrt_package
from enginehouse.build.forms.exclude import with_excluded
from enginehouse.build.forms.padding import Padding, padding_of
from enginehouse.build.forms.quantized_linear import QuantizedForm
from enginehouse.build.forms.weight_forms import (
    EXPORT_CONFIGS,
    GROUP_SIZES,
    KV_CACHE_ALGOS,
    QUANT_CONFIGS,
)
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.cuts import (
    CutModel,
    check_int8,
    check_mapping,
    check_stages,
    choose_group_size,
    cut_model,
)
from enginehouse.build.plan.hf_layout import HF_QUANTS, HfLayout, check_format
from enginehouse.build.plan.host_memory import peak_memory_bytes
from enginehouse.build.plan.quantized_before import (
    OWN_BACKENDS,
    carries_kv_scales,
    check_own_int8,
    rounded_twice,
)
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.plan.tensorrt_targets import check_tensorrt
from enginehouse.build.plan.trtllm_flags import check_flags, facts_of
from enginehouse.build.plan.unread import check_unread
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.cpu.support import cpu_refusal
from enginehouse.runtime.errors import PlanError

_QUANTS = {**QUANT_CONFIGS, **EXPORT_CONFIGS}
EXPERT_QUANTS = ("none", "fp8")  # forms whose tables for a mixture of experts are known
OWN_EXPERT_QUANTS = (*EXPERT_QUANTS, "fp8_rowwise", "int4")  # and those that we run ourselves
# With format=hf, and those that compressed-tensors' layout alone has for experts.
EXPERT_EXPORTS = (*EXPERT_QUANTS, "nvfp4", "w4a16_nvfp4", "mxfp8", "fp8_block", "mixed")
COMPRESSED_EXPERT_EXPORTS = (*EXPERT_EXPORTS, "fp8_rowwise", "int4")
# Where max_num_tokens is left out: a CPU computes in small pieces, a GPU wants large ones.
MAX_NUM_TOKENS = {"torch": 512, "cpu": 512, "tensorrt": 2048, "tensorrt_llm": 8192}


class CpuRefusal(PlanError):
    """The compiled kernels do not run this model, and torch does."""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A build that is legal. config carries mapping and quantization; settings.quant is settled.

    unpadded: the source's model, of which padding makes config's.
    scale_dtype: of INT4 scales that the source has already; None for the model's.
    rounded_twice: what of a dequantised source is, in a sentence.
    targets: the SMs that backend=tensorrt compiles for.
    builder_flags: what trtllm_build asks of trtllm-build beyond what the limits settle.
    rank_bytes: tensor bytes of each rank file, exact (a header of some KiB comes on top).
    peak_memory_bytes: an estimate for the conversion, without verification.
    """

    settings: BuildSettings
    config: ModelConfig
    unpadded: ModelConfig
    padding: Padding
    name: str
    max_seq_len: int
    max_num_tokens: int
    group_size: int | None
    rank_bytes: tuple[int, ...]
    peak_memory_bytes: int
    num_parameters: int
    builder_flags: dict[str, str]
    scale_dtype: str | None = None
    rounded_twice: str | None = None
    targets: tuple[int, ...] = ()

    @property
    def package(self) -> str:
        """What backend=tensorrt compiles the targets with; all have the same."""
        return tensorrt_package(self.targets[0])

    @property
    def max_attention_window(self) -> tuple[int, ...] | None:
        """What KvCacheConfig must be given, as a checkpoint does not carry it; None: nothing."""
        windows = tuple(self.config.extra.get("max_attention_window", ()))
        return windows if windows and min(windows) < self.max_seq_len else None


def make_plan(settings: BuildSettings, source: SourceCheckpoint) -> BuildPlan:
    """Settle every choice, or raise PlanError or CheckpointError before a weight is read.

    backend=auto is planned as torch, which runs on every machine: what this one runs is settled by
    `this_machine.py`.
    """
    if settings.backend == "auto":
        settings = replace(settings, backend="torch")
    config = source.engine_config or model_config(source.config, settings.dtype)
    if source.engine_config is not None and settings.dtype not in ("auto", config.dtype):
        raise PlanError(
            f"dtype={settings.dtype} would round the tensors of a TensorRT-LLM checkpoint in "
            f"{config.dtype} again; leave dtype out"
        )
    if source.has_weights or settings.until != "plan":
        check_tensors(source.tensors, config)
    max_num_tokens = settings.max_num_tokens or MAX_NUM_TOKENS[settings.backend]
    max_seq_len = _check_limits(settings, config, max_num_tokens)
    check_stages(config, settings.pp)
    unpadded = config = config.with_mapping(Mapping(settings.tp, settings.pp))

    form = _source_form(settings, source, config)
    settings = replace(settings, quant=form.quant)
    check_own_int8(settings, source)
    if source.has_weights:
        check_unread(source.tensors, config, settings.ignore_tensors)
    if carries_kv_scales(settings, source, config):
        settings = replace(settings, kv_cache_dtype="fp8")
    known = _expert_quants(settings, source)
    if config.num_experts and settings.quant not in known:
        raise PlanError(
            f"quant={settings.quant} has no known form for a mixture of experts "
            f"({config.architecture}); choose {', '.join(known)}"
        )
    if settings.format == "hf":
        check_format(settings, source, config, form.quantization)
    elif settings.layout != "modelopt":
        raise PlanError(
            f"layout is of no use with format={settings.format}; leave it out, or choose format=hf"
        )
    own = source.quantized is not None
    config, group_size = _cut(settings, unpadded, form.quantization, own)
    quantization = form.quantization
    if group_size is not None:
        quantization = replace(quantization, group_size=group_size)
    quantization = _quantization(settings, config, quantization, own)
    config = replace(config, quantization=quantization)
    _check_cpu(settings, config)
    _check_family(settings, config)
    # The scale of a token is its largest number's: no head may be added that has a larger one.
    rowwise = quantization.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN"
    padding = padding_of(unpadded, config, repeat_queries=rowwise)
    flags = check_flags(settings.trtllm_build or {}, facts_of(settings.quant, settings.gpu, config))

    tables = [output_tensors(config, rank, form.scale_dtype) for rank in range(settings.pp)]
    if settings.format == "hf":
        layout = HfLayout(config, settings.layout, form.scale_dtype)
        tables = [layout.table(table) for table in tables]
    stage_bytes = [sum(item.num_bytes for item in table.values()) for table in tables]
    return BuildPlan(
        settings=settings,
        config=config,
        unpadded=unpadded,
        padding=padding,
        name=settings.name or source.name,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        group_size=group_size,
        rank_bytes=tuple(size for size in stage_bytes for _ in range(settings.tp)),
        peak_memory_bytes=peak_memory_bytes(config, source, settings, padding),
        num_parameters=sum(prod(shape) for shape in expected_shapes(unpadded).values()),
        builder_flags=flags,
        scale_dtype=form.scale_dtype,
        rounded_twice=_rounded_twice(source, settings.quant, config),
        targets=check_tensorrt(settings, config),
    )


def with_forms(plan: BuildPlan, forms: AnyMapping[str, str]) -> BuildPlan:
    """A plan of MIXED_PRECISION with the form of each module that is quantised."""
    layers = tuple((module, _QUANTS[form]) for module, form in sorted(forms.items()))
    quantization = replace(plan.config.quantization, quantized_layers=layers)
    config = replace(plan.config, quantization=quantization)
    layout = HfLayout(config, plan.settings.layout, plan.scale_dtype)
    table = layout.table(output_tensors(config, 0, plan.scale_dtype))
    size = sum(item.num_bytes for item in table.values())
    return replace(plan, config=config, rank_bytes=(size,))


def _expert_quants(settings: BuildSettings, source: SourceCheckpoint) -> tuple[str, ...]:
    """Forms of a mixture's experts: our own backends run more, of what is quantised here, and other
    runtimes others.
    """
    if settings.format == "hf":
        compressed = settings.layout == "compressed_tensors"
        return COMPRESSED_EXPERT_EXPORTS if compressed else EXPERT_EXPORTS
    own = settings.backend in OWN_BACKENDS
    return OWN_EXPERT_QUANTS if own and source.quantized is None else EXPERT_QUANTS


def _source_form(
    settings: BuildSettings, source: SourceCheckpoint, config: ModelConfig
) -> QuantizedForm:
    """The form asked for, or the only one of a source that is quantised already."""
    if source.quantized is None:
        quant = "none" if settings.quant == "auto" else settings.quant
        if quant in EXPORT_CONFIGS and settings.format != "hf":
            raise PlanError(
                f"quant={quant} is a form of Hugging Face checkpoints, which no engine of "
                f"backend={settings.backend} holds; choose format=hf, or quant among "
                + ", ".join(QUANT_CONFIGS)
            )
        return QuantizedForm(quant, _QUANTS[quant])
    form = source.quantized.form(config)
    if settings.quant not in ("auto", form.quant):
        raise PlanError(
            f"quant={settings.quant} would quantise {source.name} a second time: it is quantised "
            f"already, and stays in the form {form.quant}; leave quant out{_or_dequantize(source)}"
        )
    if settings.group_size not in (None, form.quantization.group_size):
        raise PlanError(
            f"group_size={settings.group_size} is not the checkpoint's own, "
            f"{form.quantization.group_size}; leave group_size out"
        )
    return form


def _rounded_twice(source: SourceCheckpoint, quant: str, config: ModelConfig) -> str | None:
    if source.dequantized is None:
        return None
    return rounded_twice(source.dequantized, quant, config)


def _or_dequantize(source: SourceCheckpoint) -> str:
    return ", or pass --dequantize" if source.kind == "safetensors" else ""


def _cut(
    settings: BuildSettings, config: ModelConfig, quantization: QuantConfig, own: bool
) -> CutModel:
    """The model cut over its mapping, padded where it must and may be; PlanError where it cannot.

    quantization: of the form; own: it is the source's, with a group size that stays.
    """
    quant, asked = settings.quant, settings.group_size
    grouped = quant in GROUP_SIZES
    if asked is not None and not grouped:
        raise PlanError(
            f"group_size is of no use with quant={quant}; wanted quant={', '.join(GROUP_SIZES)}"
        )
    asked = quantization.group_size if own and grouped else asked
    if settings.pad and settings.format != "hf":
        for_trtllm = settings.backend == "tensorrt_llm"
        return cut_model(config, quant, asked, for_trtllm=for_trtllm, own=own)
    check_mapping(config, settings.tp)
    if quant == "int8":
        check_int8(config)
    return CutModel(config, choose_group_size(config, asked, quant, own) if grouped else None)


def _quantization(
    settings: BuildSettings, config: ModelConfig, quantization: QuantConfig, own: bool
) -> QuantConfig:
    """The checkpoint's quantization object; PlanError for what a kernel or a GPU refuses.

    quantization: of the form, with its group size; own: it is the source's.
    """
    quant, kv_cache_dtype = settings.quant, settings.kv_cache_dtype
    on_gpu = settings.backend == "tensorrt_llm" or settings.format == "hf"
    if quant != "none" and on_gpu and config.dtype == "float32":
        raise PlanError(
            f"TensorRT-LLM has no {quant} kernels for dtype=float32; choose bfloat16 or float16"
        )
    if kv_cache_dtype == "int8" and settings.backend == "tensorrt_llm":
        raise PlanError(
            "TensorRT-LLM has no INT8 KV cache with use_paged_context_fmha, which block reuse and "
            "chunked prefill need; choose kv_cache_dtype=auto, or fp8 with quant=fp8"
        )
    if settings.gpu is not None and settings.backend != "tensorrt":
        kinds = [kind for kind in KV_CACHE_ALGOS if not (on_gpu and kind == "int8")]
        # the last one, mixed, takes a limit too
        quants = HF_QUANTS[:-1] if settings.format == "hf" else tuple(QUANT_CONFIGS)
        for form in settings.mixed_forms.split(",") if quant == "mixed" else (quant,):
            check_gpu(
                settings.gpu, form, kv_cache_dtype, own=own, quants=quants, kv_cache_dtypes=kinds
            )
    reason = kv_refusal(quant, kv_cache_dtype)
    if reason is not None:
        raise PlanError(
            f"kv_cache_dtype={kv_cache_dtype} with quant={quant}: {reason}; choose "
            "kv_cache_dtype=auto" + ("" if own else ", or quant=fp8")
        )
    quantization = replace(quantization, kv_cache_quant_algo=KV_CACHE_ALGOS[kv_cache_dtype])
    if settings.exclude is None:
        return quantization
    if own:
        raise PlanError(
            "exclude is of no use with a source that is quantised already: its linears stay in "
            "the form they have; leave exclude out"
        )
    modules = (
        row.target.rpartition(".")[0]
        for pp_rank in range(config.mapping.pp_size)
        for row in stage_rows(config, pp_rank)
    )
    return with_excluded(settings.exclude, modules, quantization, settings.format == "hf")


def _check_cpu(settings: BuildSettings, config: ModelConfig) -> None:
    """CpuRefusal for what backend=cpu does not run yet; config: with its quantization."""
    if settings.backend == "cpu":
        refusal = cpu_refusal(config, settings.kv_block_size, settings.compute_dtype)
        if refusal is not None:
            raise CpuRefusal(refusal)


def _check_family(settings: BuildSettings, config: ModelConfig) -> None:
    """PlanError where TensorRT-LLM has no class of the family, or none known of the model."""
    name = config.architecture
    if settings.backend == "tensorrt_llm" and config.extra.get("dense_layers"):
        raise PlanError(
            f"backend=tensorrt_llm: no table is known of a {name} with layers without experts "
            f"({len(config.extra['dense_layers'])} of {config.num_hidden_layers}); choose "
            "backend=cpu or torch, or format=hf for the runtimes that load it"
        )
    if settings.backend == "tensorrt_llm" and not architecture_of(name).for_trtllm:
        raise PlanError(
            f"backend=tensorrt_llm: TensorRT-LLM 1.2.1 has no class for {name}, as far as we know; "
            "choose backend=cpu or torch, or format=hf for the runtimes that load it"
        )


def _check_limits(settings: BuildSettings, config: ModelConfig, max_num_tokens: int) -> int:
    """The context length; PlanError when the limits contradict the model or each other."""
    max_seq_len = settings.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.max_position_embeddings:
        raise PlanError(
            f"max_seq_len={max_seq_len} is above the model's max_position_embeddings="
            f"{config.max_position_embeddings}; choose at most {config.max_position_embeddings}"
            + _reach_of_yarn(config)
        )
    if max_num_tokens < settings.max_batch_size:
        raise PlanError(
            f"max_num_tokens={max_num_tokens} is below max_batch_size="
            f"{settings.max_batch_size}; each sequence in flight needs one token per iteration"
        )
    if settings.kv_block_size & (settings.kv_block_size - 1):
        raise PlanError(f"kv_block_size={settings.kv_block_size} is not a power of two; choose 32")
    if settings.kv_block_size > 1024 or settings.max_batch_size > 65536:
        raise PlanError(
            f"kv_block_size={settings.kv_block_size}, max_batch_size={settings.max_batch_size}: "
            "wanted at most 1024 and 65536"
        )
    return max_seq_len


def _reach_of_yarn(config: ModelConfig) -> str:
    """How a context is had that the model's yarn serves and its config.json does not announce."""
    scaling = config.rotary_scaling or {}
    key = "original_max_position_embeddings"
    original, factor = scaling.get(key), scaling.get("factor")
    if scaling.get("type") != "yarn" or not original or not factor:
        return ""
    reach = int(factor * original)
    if reach <= config.max_position_embeddings:
        return ""
    return (
        f", or write max_position_embeddings={reach}, which its yarn reaches, into config.json, "
        f"and {key}={original} into its rope"
    )

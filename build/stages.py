"""The life of a build: a list of stages, chosen once from the settings, run one after the other.

    plan -> refuse -> fetch -> digest -> reuse -> convert -> compile -> verify -> put

What is being made lies in a hidden folder beside its place, and is renamed there when it is
whole; whatever stops the build before that leaves nothing that looks like an engine. A build that
was interrupted is gone on with. What follows the plan is the backend's: one file each in backends/.
"""

from __future__ import annotations

import os
from pathlib import Path

from enginehouse.build.backends.base import Backend, Build, BuildResult, Stage
from enginehouse.build.backends.cpu import CpuBackend
from enginehouse.build.backends.hf import HfExport
from enginehouse.build.backends.shared_stages import DIGEST, FETCH, SHARE, describe_download
from enginehouse.build.backends.tensorrt import TensorRTBackend
from enginehouse.build.backends.tensorrt_llm import TensorRTLLMBackend
from enginehouse.build.backends.torch import TorchBackend
from enginehouse.build.convert.output_folder import refuse_foreign
from enginehouse.build.convert.shares import Share, check_shared, refuse_foreign_share
from enginehouse.build.original import check_original
from enginehouse.build.plan.build_plan import BuildPlan, make_plan
from enginehouse.build.plan.footprint import padding_price
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.plan.this_machine import settle_backend
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.build.report.record import recorded
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.tokenizer_files import (
    check_token_ids,
    check_tokenizer,
    with_known_ends,
    with_tokenizer,
)
from enginehouse.runtime.errors import PlanError

BACKENDS: dict[str, Backend] = {
    "torch": TorchBackend(),
    "cpu": CpuBackend(),
    "tensorrt": TensorRTBackend(),
    "tensorrt_llm": TensorRTLLMBackend(),
    "hf": HfExport(),
}


def build(
    settings: BuildSettings,
    source: SourceCheckpoint,
    progress: BuildProgress,
    share: Share | None = None,
    *,
    joins: bool = False,
) -> BuildResult:
    """Run the stages up to `settings.until`; share: or convert that, and nothing else. joins: take
    the shares that lie beside the output.

    Raises an EnginehouseError in one sentence; nothing half-made is left at the output.
    """
    source = with_settled_tokenizer(settings, source)
    settings, remark = settle_backend(settings, source)
    if remark is not None:
        progress.note(remark)
    work = Build(settings, source, progress, choose_backend(settings))
    work.share, work.joins = share, joins
    with work.folders:
        for stage in (PLAN, REFUSE, FETCH, DIGEST, SHARE) if share else stages(settings):
            if not stage.resume(work):
                with recorded(stage.name, work.costs):
                    stage.run(work)
            if work.result is not None:
                return work.result
    return BuildResult(None)


def with_settled_tokenizer(settings: BuildSettings, source: SourceCheckpoint) -> SourceCheckpoint:
    """`source` with the tokenizer that the settings name, or its own."""
    if settings.tokenizer is None:
        return source
    return with_tokenizer(source, Path(settings.tokenizer))


def settle(
    settings: BuildSettings, source: SourceCheckpoint, progress: BuildProgress
) -> tuple[BuildPlan, SourceCheckpoint]:
    """The plan, and the source with the special tokens that the model has; PlanError or
    CheckpointError for what cannot be made of model or tokenizer.
    """
    made = make_plan(settings, source)
    for remark in source.remarks:
        progress.note(remark)
    if made.rounded_twice is not None:
        progress.note(made.rounded_twice)
    vocab_size = made.config.vocab_size
    check_token_ids(source, vocab_size, progress.note)
    download = describe_download(source)
    if download is not None:
        progress.note(download)
    return made, with_known_ends(source, vocab_size, progress.note)


def choose_backend(settings: BuildSettings) -> Backend:
    return BACKENDS["hf" if settings.format == "hf" else settings.backend]


def stages(settings: BuildSettings) -> tuple[Stage, ...]:
    """Every stage of a build with these settings, in order."""
    if settings.until == "plan":
        return (PLAN,)
    return PLAN, REFUSE, FETCH, *choose_backend(settings).stages(settings.until)


def plan(work: Build) -> None:
    """`plan`: what will be made and what it will cost; PlanError for what cannot be made."""
    with work.progress.stage("plan") as stage:
        work.plan, work.source = settle(work.settings, work.source, work.progress)
        stage.finish(describe_plan(work.plan, work.source))
    settings = work.settings
    if work.plan.config.dtype == "float16" and (
        settings.until != "verify" or settings.format == "hf"
    ):
        work.progress.note(
            "whether its activations fit into float16 is found out by verify, which is left out"
        )


def refuse(work: Build) -> None:
    """Whatever this machine or the output folder has against the plan, before a weight is read."""
    settings, source = work.settings, work.source
    if not work.is_bare:
        check_tokenizer(source, work.progress.note)
    config = work.plan.config
    if source.quantized is not None and config.quantization.kv_cache_quant_algo is None:
        if source.quantized.kv_scales(config):
            work.progress.note(
                "the checkpoint's FP8 KV cache needs FP8 weights: it stays in 16 bit"
            )
    work.output = output_path(work.plan)
    if work.output.resolve() == source.path.resolve():
        raise PlanError(f"{work.output} is the source itself; choose another output")
    if work.share is not None:
        check_shared(work.plan, source)
        refuse_foreign_share(work.share.folder(work.output))
        return
    refuse_foreign(work.output, "convert" if settings.format == "hf" else settings.until)
    if settings.verify_with == "transformers":
        work.progress.note(check_original(source, work.plan.num_parameters))
    work.backend.check(work)


def describe_plan(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """What will be made and what it will cost, on one line."""
    settings, config = plan.settings, plan.config
    quant = settings.quant + (f" g={plan.group_size}" if plan.group_size else "")
    cut = f"tp={settings.tp} pp={settings.pp}" if settings.format != "hf" else "format=hf"
    price = padding_price(plan.unpadded, config)
    return (
        f"{source.name} ({config.architecture}, {plan.num_parameters / 1e6:.0f}M parameters) -> "
        f"{quant}, {cut}, {mib(sum(plan.rank_bytes))} on disk, "
        f"about {mib(plan.peak_memory_bytes)} of memory to convert"
        f"{'; ' + price if price else ''}{_describe_windows(plan)}"
    )


def _describe_windows(plan: BuildPlan) -> str:
    """The KvCacheConfig that TensorRT-LLM must be given, in the shortest list that repeats."""
    windows = plan.max_attention_window
    if windows is None:
        return ""
    count = len(windows)
    cycle = next(n for n in range(1, count + 1) if windows == (windows[:n] * count)[:count])
    return f"; serve with KvCacheConfig(max_attention_window={list(windows[:cycle])})"


def output_path(plan: BuildPlan) -> Path:
    settings = plan.settings
    if settings.output:
        return Path(os.path.abspath(settings.output))
    cut = f"-tp{settings.tp}" if settings.tp > 1 else ""
    cut += f"-pp{settings.pp}" if settings.pp > 1 else ""
    name = plan.name.rpartition("/")[2].lower()
    cut += "-hf" if settings.format == "hf" else ""
    cut += "-tensorrt" if settings.backend == "tensorrt" else ""
    return Path("engines").absolute() / f"{name}-{settings.quant}{cut}"


PLAN = Stage("plan", plan)
REFUSE = Stage("refuse", refuse)

"""The life of a build: plan -> convert -> compile -> verify, each one line of progress.

What is being made lies in a hidden folder beside its place, and is renamed there when it is
whole; whatever stops the build before that leaves nothing that looks like an engine. A build that
was interrupted is gone on with.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from enginehouse.build.convert.engine_manifest import compile_torch, hf_manifest
from enginehouse.build.convert.journal import Journal, conversion_key
from enginehouse.build.convert.output_folder import (
    made_parents,
    refuse_foreign,
    replace_folder,
    unfinished,
)
from enginehouse.build.convert.stage import run_convert
from enginehouse.build.forms.weight_forms import FP8_FORMS
from enginehouse.build.plan.build_plan import BuildPlan, make_plan
from enginehouse.build.plan.choices import choices
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.digest import source_digest
from enginehouse.build.sources.tokenizer_files import (
    check_tokenizer,
    with_tokenizer,
    write_tokenizer,
)
from enginehouse.build.tensorrt.compiler import check_compiler, load_compiler
from enginehouse.build.tensorrt.plans import write_plans
from enginehouse.build.tensorrt_llm.builder import find_builder
from enginehouse.build.tensorrt_llm.stages import (
    check_machine_early,
    checkpoint_path,
    finish_commands,
    kept_checkpoint,
    refuse_own_checkpoint,
    run_compile_checkpoint,
    still_fits,
)
from enginehouse.build.verify import MAX_MEAN_KL, VerifyFigures, verify
from enginehouse.runtime.engine import (
    Engine,
    Manifest,
    read_engine,
    verify_files,
    write_manifest,
)
from enginehouse.runtime.errors import EngineError, PlanError


class BuildResult(NamedTuple):
    """path: what was made, or was there already. finish_commands: what the GPU machine must run,
    ours or trtllm-build's own.
    """

    path: Path | None
    manifest: Manifest | None = None
    reused: bool = False
    finish_commands: tuple[str, str] | None = None


def build(
    settings: BuildSettings, source: SourceCheckpoint, progress: BuildProgress
) -> BuildResult:
    """Run the stages up to `settings.until`.

    Raises an EnginehouseError in one sentence; nothing half-made is left at the output.
    """
    if settings.tokenizer is not None:
        source = with_tokenizer(source, Path(settings.tokenizer))
    with progress.stage("plan") as stage:
        plan = make_plan(settings, source)
        stage.finish(describe_plan(plan, source))
    if settings.until == "plan":
        return BuildResult(None)
    if settings.until != "convert" or settings.format == "hf":
        check_tokenizer(source)
    if source.quantized is not None and plan.config.quantization.kv_cache_quant_algo is None:
        if source.quantized.kv_scales(plan.config):
            progress.note("the checkpoint's FP8 KV cache needs FP8 weights: it stays in 16 bit")
    if settings.format == "hf" and settings.until != "convert":
        progress.note("format=hf ends with convert: the runtime that loads it compiles by itself")
        settings = replace(settings, until="convert")
    output = output_path(plan)
    if output.resolve() == source.path.resolve():
        raise PlanError(f"{output} is the source itself; choose another output")
    refuse_foreign(output, settings.until)
    compiles = settings.backend == "tensorrt_llm" and settings.until != "convert"
    record: dict[str, Any] = {}
    if compiles:
        check_machine_early(plan)
    if settings.backend == "tensorrt" and settings.until != "convert":
        check_compiler(plan.package, plan.targets)  # soon refused
    if settings.until != "convert" or settings.format == "hf":
        record = _source_record(source, output, progress)
    if settings.until != "convert":
        existing = _existing(plan, output, record)
        if existing is not None:
            return BuildResult(output, existing, reused=True)
    earlier = None
    if compiles:
        refuse_own_checkpoint(source, output)
        earlier = kept_checkpoint(plan, record, checkpoint_path(output))
    if earlier is not None:  # it takes this build's limits and flags
        path, files = earlier.path, earlier.manifest.files
        write_manifest(path, compile_torch(plan, source, path, record, files))
        result = BuildResult(path)
    else:
        with made_parents(output):
            _check_disk(plan, output)
            with unfinished(output, conversion_key(plan, source)) as (partial, journal):
                result = _make(plan, source, partial, journal, output, record, progress)
    return _finish_tensorrt_llm(settings, output, progress) if compiles else result


def _finish_tensorrt_llm(
    settings: BuildSettings, output: Path, progress: BuildProgress
) -> BuildResult:
    """Compile the checkpoint where trtllm-build is; elsewhere say the commands that do."""
    checkpoint = read_engine(checkpoint_path(output))
    if find_builder() is None:
        return BuildResult(checkpoint.path, finish_commands=finish_commands(checkpoint, output))
    manifest = run_compile_checkpoint(
        checkpoint, output, settings.workers, settings.until, progress
    )
    return BuildResult(output, manifest)


def _make(
    plan: BuildPlan,
    source: SourceCheckpoint,
    partial: Path,
    journal: Journal,
    output: Path,
    record: dict[str, Any],
    progress: BuildProgress,
) -> BuildResult:
    settings = plan.settings
    reference = ReferenceModel(plan.config, source)
    if settings.until != "convert" or settings.format == "hf":  # soon refused
        write_tokenizer(source, partial)
    run_convert(plan, source, reference, partial, journal, progress)
    if settings.format == "hf":
        manifest = hf_manifest(plan, source, partial, record)
        write_manifest(partial, manifest)
        replace_folder(partial, output)
        return BuildResult(output, manifest)
    if settings.until == "convert":
        replace_folder(partial, output)
        return BuildResult(output)
    if settings.backend == "tensorrt_llm":
        write_manifest(partial, compile_torch(plan, source, partial, record))
        replace_folder(partial, checkpoint_path(output))
        return BuildResult(checkpoint_path(output))
    manifest = run_compile(plan, source, partial, record, progress)
    if settings.until == "verify":
        figures = run_verify(plan, source, reference, partial, manifest, progress)
        manifest = msgspec.structs.replace(manifest, verify=figures._asdict())
    write_manifest(partial, manifest)
    replace_folder(partial, output)
    return BuildResult(output, manifest)


def run_compile(
    plan: BuildPlan,
    source: SourceCheckpoint,
    directory: Path,
    record: dict[str, Any],
    progress: BuildProgress,
) -> Manifest:
    """Turn the checkpoint folder into an engine directory; its manifest is written last."""
    if plan.settings.backend == "tensorrt":
        plans = write_plans(plan, directory, progress)
        manifest = compile_torch(plan, source, directory, record)
        return msgspec.structs.replace(manifest, backend="tensorrt", tensorrt=plans)
    with progress.stage("compile") as stage:
        manifest = compile_torch(plan, source, directory, record)
        stage.finish(f"{len(manifest.files)} files, {manifest.digest[:19]}")
    return manifest


def run_verify(
    plan: BuildPlan,
    source: SourceCheckpoint,
    reference: ReferenceModel,
    directory: Path,
    manifest: Manifest,
    progress: BuildProgress,
) -> VerifyFigures:
    """Compare the engine with the unquantised model; EngineError beyond the threshold."""
    threshold = plan.settings.verify_max_mean_kl
    if threshold is None:
        threshold = MAX_MEAN_KL[_rounded_form(plan, source)]
    engine = Engine(directory, plan.config, manifest)
    with progress.stage("verify", plan.config.num_hidden_layers, "layers") as stage:
        figures = verify(engine, reference, source.bos_token_id, threshold, stage.advance)
        stage.finish(
            f"KL mean {figures.mean_kl:.4f}, max {figures.max_kl:.3f} nats; "
            f"top-1 agreement {figures.top1_agreement:.1%} of {figures.num_positions} positions"
        )
    progress.note(f"{figures.prompt!r} -> {figures.answer.strip().splitlines()[:1]}")
    if not figures.passed:
        raise EngineError(
            f"the engine's mean KL divergence from the unquantised model is {figures.mean_kl:.4f} "
            f"nats; at most {threshold} is accepted for quant={plan.settings.quant}: choose "
            "another form, or set verify_max_mean_kl if this loss is acceptable"
        )
    return figures


def _rounded_form(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """The form whose loss against the reference is to be expected.

    A source that was quantised is its own reference: only what FP8 does to activations differs.
    W8A16 is quantised where it is loaded.
    """
    quant = plan.settings.quant
    if source.quantized is None or quant == "int8":
        return quant
    return "fp8" if quant in (*FP8_FORMS, "w4a8_awq") else "none"


def describe_plan(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """What will be made and what it will cost, on one line."""
    settings, config = plan.settings, plan.config
    quant = settings.quant + (f" g={plan.group_size}" if plan.group_size else "")
    cut = f"tp={settings.tp} pp={settings.pp}" if settings.format != "hf" else "format=hf"
    return (
        f"{source.name} ({config.architecture}, {plan.num_parameters / 1e6:.0f}M parameters) -> "
        f"{quant}, {cut}, {mib(sum(plan.rank_bytes))} on disk, "
        f"about {mib(plan.peak_memory_bytes)} of memory to convert{_describe_windows(plan)}"
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


def _existing(plan: BuildPlan, output: Path, record: dict[str, Any]) -> Manifest | None:
    """The engine at `output` when it is undamaged and this very build would make it again."""
    try:
        engine = read_engine(output)
        verify_files(engine)
    except EngineError:
        return None
    manifest = engine.manifest
    verified = manifest.verify is not None or plan.settings.until != "verify"
    # as JSON has them: a tuple reads back as a list
    same = manifest.choices == msgspec.to_builtins(choices(plan))
    same = same and manifest.source.get("digest") == record["digest"]
    if plan.settings.backend == "tensorrt_llm":
        same = same and still_fits(manifest)
    if plan.settings.backend == "tensorrt":
        version = load_compiler(plan.package).__version__
        same = same and (manifest.tensorrt or {}).get("version") == version
    return manifest if verified and same else None


def _source_record(
    source: SourceCheckpoint, output: Path, progress: BuildProgress
) -> dict[str, Any]:
    """Where the weights came from, and their digest; files an earlier build hashed are known."""
    known: dict[str, Any] = {}
    try:
        known = read_engine(output).manifest.source.get("files", {})
    except EngineError:
        pass  # there is none yet, or it is damaged and will be replaced
    total = sum(path.stat().st_size for path in source.files)
    with progress.stage("digest", total, "bytes") as stage:
        done = 0

        def moved(count: int, _total: int) -> None:
            nonlocal done
            stage.advance(count - done)
            done = count

        digest = source_digest(source.files, known, moved)
        stage.finish(f"source {digest.digest[:19]}")
    return {
        "name": source.name,
        "kind": source.kind,
        "license": source.license,
        "digest": digest.digest,
        "files": digest.files,
    }


def _check_disk(plan: BuildPlan, output: Path) -> None:
    parent = output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = psutil.disk_usage(str(parent)).free
    except OSError as error:
        raise PlanError(
            f"{parent} cannot be used: {error.strerror}; choose another output"
        ) from None
    needed = sum(plan.rank_bytes) + (64 << 20)
    if free < needed:
        raise PlanError(
            f"{parent} has {mib(free)} free; this build needs {mib(needed)}: "
            "free some space or choose another output"
        )

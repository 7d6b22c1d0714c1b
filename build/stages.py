"""The life of a build: plan -> convert -> compile -> verify, each one line of progress.

What is being made lies in a hidden folder beside its place, and is renamed there when it is
whole; whatever stops the build before that leaves nothing that looks like an engine.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import psutil
from torch import Tensor

from enginehouse.build.calibration import activation_maxima, calibration_sequences, kv_scales
from enginehouse.build.checkpoint import TOKENIZER_FILES, SourceCheckpoint, source_digest
from enginehouse.build.compile import (
    choices,
    compile_torch,
    trtllm_build_command,
    write_tokenizer,
)
from enginehouse.build.convert import Calibration, convert
from enginehouse.build.forms import AWQ_FORMS
from enginehouse.build.layerwise import LayerwiseAwq
from enginehouse.build.plan import BuildPlan, make_plan
from enginehouse.build.progress import BuildProgress
from enginehouse.build.reference import ReferenceModel
from enginehouse.build.settings import BuildSettings
from enginehouse.build.tokenizer_files import check_tokenizer, with_tokenizer
from enginehouse.build.verify import MAX_MEAN_KL, VerifyFigures, verify
from enginehouse.runtime.engine import (
    MANIFEST,
    Engine,
    Manifest,
    read_engine,
    verify_files,
    write_manifest,
)
from enginehouse.runtime.errors import EngineError, PlanError

_RANK_FILE = re.compile(r"rank\d+\.safetensors")


class BuildResult(NamedTuple):
    """path: what was made, or was there already. finish_command: what the GPU machine must run."""

    path: Path | None
    manifest: Manifest | None = None
    reused: bool = False
    finish_command: str | None = None


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
    if settings.until != "convert":
        check_tokenizer(source)
    if source.quantized is not None and source.quantized.kv_scales(plan.config):
        kept = settings.kv_cache_dtype == "auto"
        instead = "it stays in 16 bit" if kept else "it is calibrated again"
        progress.note(f"the checkpoint's scales for the KV cache are left out: {instead}")
    output = output_path(plan)
    if output.resolve() == source.path.resolve():
        raise PlanError(f"{output} is the source itself; choose another output")
    _refuse_foreign(output, settings.until)
    record = _source_record(source, output, progress)
    if settings.backend == "torch" and settings.until != "convert":
        existing = _existing(plan, output, record)
        if existing is not None:
            return BuildResult(output, existing, reused=True)
    _check_disk(plan, output)
    with _partial(output) as partial:
        return _make(plan, source, partial, output, record, progress)


def _make(
    plan: BuildPlan,
    source: SourceCheckpoint,
    partial: Path,
    output: Path,
    record: dict[str, Any],
    progress: BuildProgress,
) -> BuildResult:
    settings = plan.settings
    reference = ReferenceModel(plan.config, source)
    if settings.until != "convert":
        write_tokenizer(source, partial)
    run_convert(plan, source, reference, partial, progress)
    if settings.until == "convert":
        _replace(partial, output)
        return BuildResult(output)
    if settings.backend == "tensorrt_llm":
        checkpoint = output.with_name(output.name + ".checkpoint")
        _refuse_foreign(checkpoint, "convert")
        _replace(partial, checkpoint)
        command = trtllm_build_command(plan, checkpoint, output)
        return BuildResult(checkpoint, finish_command=command)
    manifest = run_compile(plan, source, partial, record, progress)
    if settings.until == "verify":
        figures = run_verify(plan, source, reference, partial, manifest, progress)
        manifest = msgspec.structs.replace(manifest, verify=figures._asdict())
    write_manifest(partial, manifest)
    _replace(partial, output)
    return BuildResult(output, manifest)


def run_convert(
    plan: BuildPlan,
    source: SourceCheckpoint,
    reference: ReferenceModel,
    directory: Path,
    progress: BuildProgress,
) -> None:
    """Calibrate if the form needs it, then write config.json and the rank files."""
    calibration = _calibrate(plan, source, reference, directory, progress)
    with progress.stage("convert", sum(plan.rank_bytes), "bytes") as stage:
        convert(plan, source, directory, calibration, stage.advance)
        stage.finish(f"{len(plan.rank_bytes)} rank file(s), {_mib(sum(plan.rank_bytes))}")


def _calibrate(
    plan: BuildPlan,
    source: SourceCheckpoint,
    reference: ReferenceModel,
    directory: Path,
    progress: BuildProgress,
) -> Calibration:
    """Run the calibration text where a form needs it; AWQ does so while the layers are written.

    Linears that the source has quantised need none; a quantised KV cache does.
    """
    quant, kv_algo = plan.settings.quant, plan.config.quantization.kv_cache_quant_algo
    calibrated = quant == "fp8" and source.quantized is None
    searched = quant in AWQ_FORMS and source.quantized is None
    if not calibrated and not searched and kv_algo is None:
        return Calibration({}, {})
    sequences = _calibration_sequences(plan, source, directory)
    maxima: dict[str, float] = {}
    scales: dict[int, float] = {}
    if calibrated or kv_algo is not None:
        with progress.stage("calibrate", plan.config.num_hidden_layers, "layers") as stage:
            maxima, keys_values = activation_maxima(reference, sequences, stage.advance)
            tokens = sum(len(sequence) for sequence in sequences)
            stage.finish(f"{tokens} tokens in {len(sequences)} sequences")
        scales = kv_scales(keys_values, kv_algo) if kv_algo else {}
    awq = LayerwiseAwq(plan.config, reference, sequences) if searched else None
    return Calibration(maxima, scales, awq)


def _calibration_sequences(
    plan: BuildPlan, source: SourceCheckpoint, directory: Path
) -> list[Tensor]:
    with ExitStack() as stack:
        if not (directory / "tokenizer.json").exists():  # a checkpoint alone holds none
            directory = Path(stack.enter_context(TemporaryDirectory(dir=directory)))
            source.write_tokenizer(directory)
        return calibration_sequences(
            directory,
            plan.settings.calib_samples,
            min(plan.settings.calib_length, plan.max_seq_len),
            source.bos_token_id,
        )


def run_compile(
    plan: BuildPlan,
    source: SourceCheckpoint,
    directory: Path,
    record: dict[str, Any],
    progress: BuildProgress,
) -> Manifest:
    """Turn the checkpoint folder into an engine directory; its manifest is written last."""
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
    """
    if source.quantized is None:
        return plan.settings.quant
    return "fp8" if plan.settings.quant.startswith("fp8") else "none"


def describe_plan(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """What will be made and what it will cost, on one line."""
    settings, config = plan.settings, plan.config
    quant = settings.quant + (f" g={plan.group_size}" if plan.group_size else "")
    return (
        f"{source.name} ({config.architecture}, {plan.num_parameters / 1e6:.0f}M parameters) -> "
        f"{quant}, tp={settings.tp} pp={settings.pp}, {_mib(sum(plan.rank_bytes))} on disk, "
        f"about {_mib(plan.peak_memory_bytes)} of memory to convert{_describe_windows(plan)}"
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
    return Path("engines").absolute() / f"{name}-{settings.quant}{cut}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


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


def _refuse_foreign(output: Path, until: str) -> None:
    """Never replace what this project did not make, nor a verified engine by less than one."""
    if not output.exists():
        return
    if not output.is_dir():
        raise PlanError(f"{output} is a file; choose another output")
    names = {path.name for path in output.iterdir()}
    try:
        manifest = msgspec.json.decode((output / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        ours = {"config.json", *TOKENIZER_FILES}
        extra = {name for name in names - ours if not _RANK_FILE.fullmatch(name)}
        if names and "config.json" not in names:
            extra = names
    else:
        extra = names - {MANIFEST, *manifest.files}
        if until != "verify" and manifest.verify is not None and not extra:
            raise PlanError(
                f"{output} is a verified engine, which --until {until} would replace; "
                "choose another output"
            )
    if extra:
        raise PlanError(
            f"{output} holds {min(extra)}, which is no part of an engine or a checkpoint; "
            "choose another output, or move it away"
        )


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
            f"{parent} has {_mib(free)} free; this build needs {_mib(needed)}: "
            "free some space or choose another output"
        )


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, for one build at a time, gone when the build is over."""
    partial = output.with_name(f".{output.name}.partial")
    lock_path = output.with_name(f".{output.name}.lock")
    try:
        lock = lock_path.open("w")
    except OSError as error:
        raise PlanError(f"{output.parent} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = lock_path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False  # held, or just unlinked by the build that held it
        if not current:
            raise PlanError(
                f"another build of {output} is running; wait for it or choose another output"
            )
        _clear_remains(partial, output)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _replace(partial: Path, output: Path) -> None:
    """Put the finished folder in its place. An older one is moved aside first, then deleted;
    when the build is killed in between, the next one moves it back (`_partial`).
    """
    aside = _aside(output)
    if output.exists():
        output.rename(aside)
    partial.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _clear_remains(partial: Path, output: Path) -> None:
    """Undo what a build that was killed left behind."""
    shutil.rmtree(partial, ignore_errors=True)
    aside = _aside(output)
    if aside.exists() and not output.exists():
        aside.rename(output)
    shutil.rmtree(aside, ignore_errors=True)

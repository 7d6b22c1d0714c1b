"""The stages that several backends go through: fetch, digest, reuse, convert, verify, put.

Each says its line of progress, where it has one, and what of an earlier build it goes on with; none
knows which backend it is run for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import psutil
from torch import Tensor

from enginehouse.build.backends.base import Build, BuildResult, Stage
from enginehouse.build.convert.journal import conversion_key
from enginehouse.build.convert.output_folder import made_parents, replace_folder, unfinished
from enginehouse.build.convert.shares import (
    convert_share,
    find_shares,
    join,
    put_record,
    share_key,
    share_of,
    size_of,
)
from enginehouse.build.convert.stage import open_sink, run_convert
from enginehouse.build.forms.weight_forms import FP8_FORMS
from enginehouse.build.original import original_logits
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.choices import choices
from enginehouse.build.progress import mib
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.report.record import build_record
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.digest import source_digest
from enginehouse.build.verify import INT8_ACTIVATIONS_KL, INT8_KV_KL, MAX_MEAN_KL, verify
from enginehouse.runtime.engine import (
    Engine,
    read_engine,
    verify_files,
    write_manifest,
)
from enginehouse.runtime.errors import EngineError, PlanError


def fetch(work: Build) -> None:
    """`fetch`: the weight files that are still on the hub, now that the plan stands."""
    source, missing = work.source, work.source.missing
    if source.remote is None or not missing:
        return
    _check_room(work.plan, source, work.output)
    total = sum(map(source.remote.size, missing))
    with work.progress.stage("fetch", total, "bytes") as stage:
        source.remote.fetch(missing, stage.advance)
        stage.finish(f"{source.origin}: {len(missing)} files, {mib(total)}")


def describe_download(source: SourceCheckpoint) -> str | None:
    """What a build will fetch first, and whether there is room for it; None for nothing."""
    if source.remote is None or not source.missing:
        return None
    needed = sum(map(source.remote.size, source.missing))
    free = psutil.disk_usage(str(source.path)).free
    return (
        f"to fetch: {len(source.missing)} files, {mib(needed)}, into {source.path}, which has "
        f"{mib(free)} free{'' if needed <= free else ': TOO LITTLE'}"
    )


def _check_room(plan: BuildPlan, source: SourceCheckpoint, output: Path) -> None:
    """PlanError where what is to be fetched, and the engine on the same disk, have no room."""
    assert source.remote is not None
    needed = sum(map(source.remote.size, source.missing))
    what = "the weights that are to be fetched"
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if above.stat().st_dev == source.path.stat().st_dev:
        needed += sum(plan.rank_bytes)
        what += " and the engine"
    free = psutil.disk_usage(str(source.path)).free
    if free < needed:
        raise PlanError(
            f"{source.path} has {mib(free)} free; {what} need {mib(needed)}: free some space, or "
            "set HF_HOME to a folder on another disk"
        )


def digest(work: Build) -> None:
    """`digest`: where the weights came from. Files that an earlier build hashed are known."""
    source, known = work.source, {}
    try:
        known = read_engine(work.output).manifest.source.get("files", {})
    except EngineError:
        pass  # there is none yet, or it is damaged and will be replaced
    total = sum(path.stat().st_size for path in source.files)
    with work.progress.stage("digest", total, "bytes") as stage:
        done = 0

        def moved(count: int, _total: int) -> None:
            nonlocal done
            stage.advance(count - done)
            done = count

        found = source_digest(source.files, known, moved)
        stage.finish(f"source {found.digest[:19]}")
    work.record = {
        "name": source.name,
        "kind": source.kind,
        "license": source.license,
        **({"origin": source.origin} if source.origin else {}),
        **({"dequantized": source.dequantized.name} if source.dequantized else {}),
        "digest": found.digest,
        "files": found.files,
    }


def reuse(work: Build) -> None:
    """The engine at the output ends the build when it is undamaged and of this very build."""
    try:
        engine = read_engine(work.output)
        verify_files(engine)
    except EngineError:
        return
    manifest = engine.manifest
    verified = manifest.verify is not None or work.settings.until != "verify"
    # as JSON has them: a tuple reads back as a list
    same = manifest.choices == msgspec.to_builtins(choices(work.plan))
    same = same and manifest.source.get("digest") == work.record["digest"]
    if verified and same and work.backend.still_fits(manifest, work.plan):
        work.result = BuildResult(work.output, manifest, reused=True)


def convert(work: Build) -> None:
    """`convert`, and `resume` and `calibrate` before it: a checkpoint in a hidden folder.

    What the journal of an interrupted build knows to be finished is kept.
    """
    work.folders.enter_context(made_parents(work.output))
    _check_disk(work.plan, work.output)
    hidden = unfinished(work.output, conversion_key(work.plan, work.source))
    work.directory, work.journal = work.folders.enter_context(hidden)
    work.reference = ReferenceModel(work.plan.unpadded, work.source)
    if not work.is_bare:
        work.source.write_tokenizer(work.directory)
    if work.joins:
        _join(work)
    run_convert(work.plan, work.source, work.reference, work.directory, work.journal, work.progress)


def _join(work: Build) -> None:
    """`join`: the tensors of all shares, so that `convert` has only what stands beside them."""
    if not work.record:
        digest(work)
    folders = find_shares(work.output, share_key(work.plan, work.record))
    size = size_of(folders)
    with work.progress.stage("join", size, "bytes") as stage:
        with open_sink(work.plan, work.source, work.directory) as sink:
            join(folders, sink, work.journal, stage.advance)
        stage.finish(f"{len(folders)} shares, {mib(size)}")


def convert_shared(work: Build) -> None:
    """`share`: some of the units, in a folder of their own beside the output."""
    assert work.share is not None
    work.folders.enter_context(made_parents(work.output))
    plan, source, share = work.plan, work.source, work.share
    folder, key = share.folder(work.output), share_key(work.plan, work.record)
    keys = share_of(plan, source, share)
    hidden = unfinished(folder, f"{key} {share.index}/{share.count}")
    directory, journal = work.folders.enter_context(hidden)
    with work.progress.stage("share", len(keys), "tensors") as stage:
        with open_sink(plan, source, directory) as sink:
            convert_share(plan, source, sink, keys, journal, lambda _key, _size: stage.advance(1))
        put_record(directory, share, key, journal)
        stage.finish(
            f"{share.index}/{share.count}: {len(keys)} tensors, {mib(size_of([directory]))}"
        )
    replace_folder(directory, folder)
    work.result = BuildResult(folder)


def check_answer(work: Build) -> None:
    """`verify`: the engine against the unquantised model; EngineError beyond the threshold."""
    assert work.manifest is not None
    plan, progress = work.plan, work.progress
    threshold = plan.settings.verify_max_mean_kl
    if threshold is None:
        threshold = MAX_MEAN_KL[_rounded_form(plan, work.source)]
        if plan.settings.backend == "cpu" and plan.settings.cpu_activations == "int8":
            threshold += INT8_ACTIVATIONS_KL
        if plan.settings.backend == "cpu" and plan.settings.kv_cache_dtype == "int8":
            threshold += INT8_KV_KL
    engine = Engine(work.directory, plan.config, work.manifest)
    with progress.stage("verify", plan.config.num_hidden_layers, "layers") as stage:
        figures = verify(
            engine, partial(_truth, work, stage.advance), work.source.bos_token_id, threshold
        )
        stage.finish(
            f"KL mean {figures.mean_kl:.4f}, max {figures.max_kl:.3f} nats; "
            f"top-1 agreement {figures.top1_agreement:.1%} of {figures.num_positions} positions"
        )
    progress.note(f"{figures.prompt!r} -> {figures.answer.strip().splitlines()[:1]}")
    if figures.largest_activation is not None and (doubt := figures.largest_activation.doubt):
        progress.note(doubt)
    if not figures.passed:
        raise EngineError(
            f"the engine's mean KL divergence from the unquantised model is {figures.mean_kl:.4f} "
            f"nats; at most {threshold:g} is accepted for quant={plan.settings.quant}: choose "
            "another form, or set verify_max_mean_kl if this loss is acceptable"
        )
    work.manifest = msgspec.structs.replace(work.manifest, verify=figures._asdict())


def _truth(work: Build, advance: Callable[[int], None], ids: Tensor) -> Tensor:
    """The unquantised model's logits: int64 [tokens] -> float32 [tokens, vocab_size]."""
    if work.plan.settings.verify_with == "transformers":
        return original_logits(work.source, ids)
    return work.reference.logits(work.reference.hidden_states([ids], advance=advance))[0]


def put(work: Build) -> None:
    """The finished folder takes its place, whole, with its manifest written last."""
    if work.manifest is not None:
        found = build_record(work.plan, work.source, work.costs, work.journal.errors)
        work.manifest = msgspec.structs.replace(work.manifest, build=found)
        write_manifest(work.directory, work.manifest)
    replace_folder(work.directory, work.output)
    work.result = BuildResult(work.output, work.manifest)


def engine_stages(until: str, compile_engine: Callable[[Build], None]) -> tuple[Stage, ...]:
    """The stages of a backend whose engine is the checkpoint's folder and what is added to it."""
    if until == "convert":
        return CONVERT, PUT
    verified = (VERIFY,) if until == "verify" else ()
    return DIGEST, REUSE, CONVERT, Stage("compile", compile_engine), *verified, PUT


def _rounded_form(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """The form whose loss against the reference is to be expected.

    A source that was quantised is its own reference: only what FP8 does to activations differs.
    W8A16 is quantised where it is loaded, but of a source in INT8.
    """
    quant = plan.settings.quant
    if source.quantized is None or (quant == "int8" and plan.scale_dtype is None):
        return quant
    return "fp8" if quant in (*FP8_FORMS, "w4a8_awq") else "none"


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


FETCH = Stage("fetch", fetch)
DIGEST = Stage("digest", digest)
REUSE = Stage("reuse", reuse)
SHARE = Stage("share", convert_shared)
CONVERT = Stage("convert", convert)
VERIFY = Stage("verify", check_answer)
PUT = Stage("put", put)

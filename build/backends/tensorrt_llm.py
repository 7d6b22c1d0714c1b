"""TensorRT-LLM engines: the checkpoint is kept, and compiled where `trtllm-build` is.

Elsewhere the build ends with the checkpoint and the commands that finish it on the GPU machine.
"""

from __future__ import annotations

import msgspec

from enginehouse.build.backends.base import Build, BuildResult, Stage
from enginehouse.build.backends.shared_stages import CONVERT, DIGEST, PUT, REUSE, convert
from enginehouse.build.convert.engine_manifest import engine_manifest
from enginehouse.build.convert.output_folder import replace_folder
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.report.record import build_record
from enginehouse.build.tensorrt_llm.builder import find_builder
from enginehouse.build.tensorrt_llm.compile import (
    check_machine_early,
    finish_commands,
    run_compile_checkpoint,
    still_fits,
)
from enginehouse.build.tensorrt_llm.kept_checkpoint import (
    checkpoint_path,
    kept_checkpoint,
    refuse_own_checkpoint,
)
from enginehouse.runtime.engine import Manifest, read_engine, write_manifest


class TensorRTLLMBackend:
    """Satisfies `base.Backend`. Leaves NAME.checkpoint beside the engine NAME."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        if until == "convert":
            return CONVERT, PUT
        return (
            DIGEST,
            REUSE,
            Stage("refuse", keep_off_foreign_checkpoint),
            Stage("convert", convert_and_keep, resume=kept_from_before),
            Stage("compile", compile_checkpoint),
        )

    def check(self, work: Build) -> None:
        if work.settings.until != "convert":
            check_machine_early(work.plan)

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return still_fits(manifest)


def keep_off_foreign_checkpoint(work: Build) -> None:
    """PlanError unless the checkpoint may be written beside the output."""
    refuse_own_checkpoint(work.source, work.output)


def convert_and_keep(work: Build) -> None:
    """`convert`: the checkpoint, with a manifest, beside the engine's place."""
    convert(work)
    manifest = engine_manifest(work.plan, work.source, work.directory, work.record)
    found = build_record(work.plan, work.source, work.costs, work.journal.errors)
    write_manifest(work.directory, msgspec.structs.replace(manifest, build=found))
    replace_folder(work.directory, checkpoint_path(work.output))
    work.folders.close()


def kept_from_before(work: Build) -> bool:
    """Whether an earlier build left this checkpoint; it takes this build's limits and flags."""
    kept = kept_checkpoint(work.plan, work.record, checkpoint_path(work.output))
    if kept is None:
        return False
    path, files = kept.path, kept.manifest.files
    manifest = engine_manifest(work.plan, work.source, path, work.record, files)
    write_manifest(path, msgspec.structs.replace(manifest, build=kept.manifest.build))
    return True


def compile_checkpoint(work: Build) -> None:
    """`compile` and `verify`: trtllm-build, and its engine's answer; or the commands for both."""
    checkpoint = read_engine(checkpoint_path(work.output))
    if find_builder() is None:
        commands = finish_commands(checkpoint, work.output)
        work.result = BuildResult(checkpoint.path, finish_commands=commands)
        return
    settings = work.settings
    work.manifest = run_compile_checkpoint(
        checkpoint, work.output, settings.workers, settings.until, work.progress
    )
    work.result = BuildResult(work.output, work.manifest)

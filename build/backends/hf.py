"""A quantised Hugging Face checkpoint: no engine, but what other runtimes load and cut."""

from __future__ import annotations

from msgspec.structs import replace

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import CONVERT, DIGEST, PUT
from enginehouse.build.convert.engine_manifest import engine_manifest
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.runtime.engine import Manifest


class HfExport:
    """Satisfies `base.Backend`, though nothing here runs what it makes."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        return DIGEST, CONVERT, Stage("manifest", describe_checkpoint), PUT

    def check(self, work: Build) -> None:
        if work.settings.until != "convert":
            work.progress.note(
                "format=hf ends with convert: the runtime that loads it compiles by itself"
            )

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return True


def describe_checkpoint(work: Build) -> None:
    """What the checkpoint is known again by."""
    manifest = engine_manifest(work.plan, work.source, work.directory, work.record)
    work.manifest = replace(manifest, backend="none")

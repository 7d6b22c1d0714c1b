"""A quantised Hugging Face checkpoint: no engine, but what other runtimes load and cut."""

from __future__ import annotations

from msgspec.structs import replace

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import CONVERT, DIGEST, PUT
from enginehouse.build.convert.engine_manifest import engine_manifest
from enginehouse.build.convert.stage import choose_mixture
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.runtime.engine import Manifest


class HfExport:
    """Satisfies `base.Backend`, though nothing here runs what it makes."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        choose = Stage("choose", choose_forms)
        return DIGEST, choose, CONVERT, Stage("manifest", describe_checkpoint), PUT

    def check(self, work: Build) -> None:
        if work.settings.until != "convert":
            work.progress.note(
                "format=hf ends with convert: the runtime that loads it compiles by itself"
            )

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return True


def choose_forms(work: Build) -> None:
    """Of MIXED_PRECISION, the form of each linear; nothing for other forms."""
    if work.plan.settings.quant == "mixed":
        reference = ReferenceModel(work.plan.unpadded, work.source)
        work.plan = choose_mixture(work.plan, work.source, reference, work.progress)


def describe_checkpoint(work: Build) -> None:
    """What the checkpoint is known again by."""
    manifest = engine_manifest(work.plan, work.source, work.directory, work.record)
    work.manifest = replace(manifest, backend="none")

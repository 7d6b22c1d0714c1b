"""The embedded backend: the checkpoint's folder with tokenizer and manifest is the engine."""

from __future__ import annotations

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import engine_stages
from enginehouse.build.convert.engine_manifest import engine_manifest
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.runtime.engine import Manifest


class TorchBackend:
    """Satisfies `base.Backend`. Every machine runs what it makes."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        return engine_stages(until, hash_engine)

    def check(self, work: Build) -> None:
        pass  # torch runs every form

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return True


def hash_engine(work: Build) -> None:
    """`compile`: each file is hashed; nothing else is to be done."""
    with work.progress.stage("compile") as stage:
        manifest = engine_manifest(work.plan, work.source, work.directory, work.record)
        stage.finish(f"{len(manifest.files)} files, {manifest.digest[:19]}")
    work.manifest = manifest

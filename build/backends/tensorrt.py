"""Native TensorRT engines: plans of our own network beside the checkpoint's rank files."""

from __future__ import annotations

import msgspec

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import engine_stages
from enginehouse.build.convert.engine_manifest import engine_manifest
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.tensorrt.compiler import check_compiler, load_compiler
from enginehouse.build.tensorrt.plans import write_plans
from enginehouse.runtime.engine import Manifest


class TensorRTBackend:
    """Satisfies `base.Backend`. Compiles on any machine; verified with the rank files on a CPU."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        return engine_stages(until, compile_plans)

    def check(self, work: Build) -> None:
        if work.settings.until != "convert":
            check_compiler(work.plan.package, work.plan.targets)

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        version = load_compiler(plan.package).__version__
        return bool((manifest.tensorrt or {}).get("version") == version)


def compile_plans(work: Build) -> None:
    """`compile`: every plan in a process of its own. An interrupted one compiles all again."""
    plans = write_plans(work.plan, work.directory, work.progress)
    manifest = engine_manifest(work.plan, work.source, work.directory, work.record)
    work.manifest = msgspec.structs.replace(manifest, backend="tensorrt", tensorrt=plans)

"""The compiled backend: the torch backend's folder, whose weights are packed when it is opened."""

from __future__ import annotations

from msgspec.structs import replace

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import engine_stages
from enginehouse.build.backends.torch import hash_engine
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.engine import Manifest
from enginehouse.runtime.errors import EngineError


class CpuBackend:
    """Satisfies `base.Backend`. The plan has refused what the kernels do not run."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        return engine_stages(until, hash_for_cpu)

    def check(self, work: Build) -> None:
        """The engine may be served elsewhere: a machine without a compiler is only told."""
        try:
            find_compiler()
        except EngineError as error:
            work.progress.note(f"this machine cannot run the engine: {error}")

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return True


def hash_for_cpu(work: Build) -> None:
    """`compile`: each file is hashed; the kernels are compiled, and weights packed, at load."""
    hash_engine(work)
    assert work.manifest is not None
    work.manifest = replace(work.manifest, backend="cpu")

"""The compiled backend: the torch backend's folder, and its weights packed for the kernels."""

from __future__ import annotations

from msgspec.structs import replace

from enginehouse.build.backends.base import Build, Stage
from enginehouse.build.backends.shared_stages import engine_stages
from enginehouse.build.backends.torch import hash_engine
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.progress import mib
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.packed_file import LAYOUT, PACKED
from enginehouse.runtime.cpu.packing import pack_engine
from enginehouse.runtime.engine import Manifest
from enginehouse.runtime.errors import EngineError

_PACKING = "packing"  # of the manifest's versions


class CpuBackend:
    """Satisfies `base.Backend`. The plan has refused what the kernels do not run."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        return engine_stages(until, pack_for_cpu)

    def check(self, work: Build) -> None:
        """The engine may be served elsewhere: a machine without a compiler is only told."""
        try:
            find_compiler()
        except EngineError as error:
            work.progress.note(
                f"this machine cannot run the engine, and verify computes with torch: {error}"
            )

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        return manifest.versions.get(_PACKING) == str(LAYOUT)


def pack_for_cpu(work: Build) -> None:
    """`compile`: the weights are packed, and each file hashed; kernels are compiled at load."""
    plan = work.plan
    with work.progress.stage("pack", plan.config.num_hidden_layers, "layers") as stage:
        packed, activations = work.directory / PACKED, plan.settings.cpu_activations
        pack_engine(
            work.directory, plan.config, plan.max_seq_len, activations, packed, stage.advance
        )
        stage.finish(f"{mib(packed.stat().st_size)}, activations in {activations}")
    hash_engine(work)
    assert work.manifest is not None
    versions = {**work.manifest.versions, _PACKING: str(LAYOUT)}
    work.manifest = replace(work.manifest, backend="cpu", versions=versions)

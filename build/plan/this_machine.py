"""Which backend an engine gets when nobody chose one: what this machine runs best.

Knows the machine and whether the kernels run the model; no weight is read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from enginehouse.build.plan.build_plan import CpuRefusal, make_plan
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.errors import EngineError


def settle_backend(
    settings: BuildSettings, source: SourceCheckpoint
) -> tuple[BuildSettings, str | None]:
    """The settings with auto settled, and why it is not cpu, where it could have been.

    Raises PlanError and CheckpointError as `make_plan` does.
    """
    if settings.backend != "auto":
        return settings, None
    if settings.format == "hf":  # makes no engine
        return replace(settings, backend="torch"), None
    try:
        if torch.cuda.is_available():
            raise EngineError("this machine has a CUDA GPU, which torch computes on")
        find_compiler()
        settled = replace(settings, backend="cpu")
        make_plan(settled, source)
    except (EngineError, CpuRefusal) as reason:
        return replace(settings, backend="torch"), f"backend=torch: {reason}"
    return settled, None

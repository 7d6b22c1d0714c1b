"""What a build found on its way -> BuildRecord, which its manifest keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.footprint import memory_record
from enginehouse.build.progress import ticking
from enginehouse.build.quantize.layer_errors import ErrorLog
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import BuildRecord, StageRecord

_LOOK_S = 0.25
_WEIGHTS = (".safetensors", ".gguf")


@contextmanager
def recorded(name: str, records: list[StageRecord]) -> Iterator[None]:
    """Put the body's time and this process's peak memory meanwhile into `records`."""
    process, started_s = psutil.Process(), time.monotonic()
    peak = process.memory_info().rss

    def look() -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    with ticking(_LOOK_S, look):
        yield
    look()
    records.append(StageRecord(name, round(time.monotonic() - started_s, 3), peak))


def build_record(
    plan: BuildPlan, source: SourceCheckpoint, stages: Sequence[StageRecord], log: ErrorLog
) -> BuildRecord:
    found = log.read()
    return BuildRecord(
        source_bytes=sum(path.stat().st_size for path in source.files if path.suffix in _WEIGHTS),
        weight_bytes=sum(plan.rank_bytes),
        num_parameters=plan.num_parameters,
        stages=tuple(stages),
        memory=memory_record(plan),
        errors_of=found.of if found else "",
        errors=tuple(found.errors.items()) if found else (),
    )

"""A plan and a source become a checkpoint, a few tensors at a time.

Units are read, fused, quantised and written by two threads, so that the disk and the arithmetic
work at once; how many are in flight is bounded by their bytes. A unit that the journal calls
finished is not touched again. What a unit is and becomes is quantize/units.py's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from enginehouse.build.convert.journal import Journal
from enginehouse.build.convert.rank_files import Sink
from enginehouse.build.families.output_table import KV_SCALE
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.quantize.pieces import Pieces
from enginehouse.build.quantize.units import (
    Calibration,
    Unit,
    convert_unit,
    source_bytes,
    stage_layers,
    unit_bytes,
    units,
)
from enginehouse.build.source import SourceCheckpoint

NUM_THREADS = 2
# What the units in flight may take beside two of the source's largest tensor.
_SPARE_BYTES = 256 << 20


def convert(
    plan: BuildPlan,
    source: SourceCheckpoint,
    sink: Sink,
    calibration: Calibration,
    advance: Callable[[str, int], None],
    journal: Journal,
    finished: Collection[str] = (),
) -> None:
    """Put every tensor of the plan into the sink; advance(key, bytes) after each unit.

    finished: keys of units that are in the sink already. Raises QuantizationError for weights
    with NaN or Inf. Memory: a few pieces of tensors, at most two of the largest whole one where
    a form or format needs it whole, and what `calibration.linears` takes.
    """
    config = plan.config
    left = [unit for unit in units(config, source) if unit.key not in finished]
    convert_units(plan, source, sink, calibration, advance, journal, left)
    if config.quantization.kv_cache_quant_algo is not None:
        for pp_rank in range(config.mapping.pp_size):
            for local, layer in enumerate(stage_layers(config, pp_rank)):
                if not config.has_keys(layer):
                    continue
                scale = torch.tensor([calibration.kv_scales[layer]])
                sink.put(pp_rank, KV_SCALE.format(local), Pieces.of(scale))
    sink.finish()


def convert_units(
    plan: BuildPlan,
    source: SourceCheckpoint,
    sink: Sink,
    calibration: Calibration,
    advance: Callable[[str, int], None],
    journal: Journal,
    left: list[Unit],
) -> None:
    """Some of the units, in their order; the sink is not finished."""
    config = plan.config
    every = list(units(config, source))
    largest = max(source_bytes(row, source) for unit in every for row in unit.rows)
    gate = _MemoryGate(2 * largest + _SPARE_BYTES)

    def held(unit: Unit) -> int:
        return unit_bytes(unit, config, source, plan.settings.format == "hf", plan.padding)

    def work(unit: Unit) -> None:
        with gate.holding(held(unit)):
            stored = [
                item
                for name, pieces in convert_unit(
                    config, unit, source, calibration, plan.padding, journal.errors
                )
                for item in sink.put(unit.pp_rank, name, pieces)
            ]
        journal.record(unit.key, stored)
        advance(unit.key, sum(item.num_bytes for item in stored))

    if calibration.linears is not None:  # layer after layer, each with all threads
        for unit in left:
            work(unit)
    else:
        _in_threads(work, left)


def _in_threads(work: Callable[[Unit], None], left: list[Unit]) -> None:
    """Every unit, in order, two at a time. The first error, or an interruption, stops the rest."""
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        NUM_THREADS, "convert", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = [pool.submit(work, unit) for unit in left]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


class _MemoryGate:
    """Lets threads in while what they hold together stays in a budget; one alone always may."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self._budget)
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()

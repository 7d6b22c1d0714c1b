"""What each of N shares of a conversion reads, writes and takes, from shapes: before one is made.

Bytes are exact where tensors are known; seconds are what they would be at the speed that two cores
had (docs/measurements.md), from a disk that keeps up. Reads no weight.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from enginehouse.build.convert.shares import Share, check_shared, share_of, unit_sizes
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.quantize.units import units
from enginehouse.build.source import SourceCheckpoint

GIB = 2**30
# Bytes of the source a second: of a copy, and of a form whose scales are searched.
_COPIED_PER_S, _ROUNDED_PER_S = 1.39e9, 0.35e9


class ShareCost(NamedTuple):
    """read_bytes: of the source. written_bytes: of the engine, the share's folder on disk."""

    read_bytes: int
    written_bytes: int
    seconds: float


def share_costs(plan: BuildPlan, source: SourceCheckpoint, count: int) -> list[ShareCost]:
    """Of shares 1/count to count/count. A source whose weights are not here is taken to have every
    tensor in the model's dtype; what `--format hf` writes is told by what is read.

    Raises PlanError for a form that cannot be shared.
    """
    check_shared(plan, source)
    read = unit_sizes(plan, source)
    written = _written(plan, source, read)
    speed = _COPIED_PER_S if plan.config.quantization.quant_algo is None else _ROUNDED_PER_S
    costs = []
    for index in range(1, count + 1):
        keys = share_of(plan, source, Share(index, count))
        reads = sum(read[key] for key in keys)
        costs.append(ShareCost(reads, sum(written[key] for key in keys), reads / speed))
    return costs


def _written(plan: BuildPlan, source: SourceCheckpoint, read: dict[str, int]) -> dict[str, int]:
    """Bytes of all ranks by unit; a module's scales are written with its weight."""
    total = sum(plan.rank_bytes)
    if plan.settings.format == "hf":
        whole = max(1, sum(read.values()))
        return {key: total * size // whole for key, size in read.items()}
    written = dict.fromkeys(read, 0)
    for rank in range(plan.settings.pp):
        of_rank = [unit for unit in units(plan.config, source) if unit.pp_rank == rank]
        targets = {row.target: unit.key for unit in of_rank for row in unit.rows}
        modules = {
            target.rpartition(".")[0]: key
            for target, key in sorted(targets.items())  # .weight behind .bias
        }
        for name, tensor in output_tensors(plan.config, rank, plan.scale_dtype).items():
            key = targets.get(name) or modules.get(name.rpartition(".")[0])
            if key is not None:  # a KV cache's scales are the join's
                written[key] += tensor.num_bytes * plan.settings.tp
    return written


def print_shares(plan: BuildPlan, costs: list[ShareCost], console: Console) -> None:
    """The table of `--plan --shares`; the join copies every tensor once."""
    table = Table("share", "reads, GiB", "writes, GiB", "minutes", box=None, pad_edge=False)
    for index, cost in enumerate(costs, 1):
        table.add_row(f"{index}/{len(costs)}", *_words(cost))
    total = sum(plan.rank_bytes)
    table.add_row("--join", *_words(ShareCost(total, total, total / _COPIED_PER_S)))
    console.print(table)
    console.print(
        f"Each holds about {plan.peak_memory_bytes / GIB:.2f} GiB at most. Minutes: of two cores, "
        "at the measured speed (docs/measurements.md); a slower disk or network takes longer."
    )


def _words(cost: ShareCost) -> tuple[str, str, str]:
    minutes = f"{cost.seconds / 60:.1f}"
    return f"{cost.read_bytes / GIB:.2f}", f"{cost.written_bytes / GIB:.2f}", minutes

"""A decode step's parts beside what the machine allows, and the rows that tell of both.

Asks our contenders for their profile; knows no goal but the share of what is not the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benches.contender import Contender, ContenderFailed
from benches.goals import number
from benches.machine import Limits, step_work
from benches.prompts import Prompts
from benches.quiet import Others
from benches.turns import Sizes
from enginehouse.runtime.cpu.packed_file import Network

LOADS = (1, 4, 16, 32)


class Profile(NamedTuple):
    """parts: milliseconds of a step. least_ms: the machine's limit for it. busy: others' share."""

    who: str
    batch: int
    parts: dict[str, float]
    least_ms: float
    busy: float

    @property
    def step_ms(self) -> float:
        return sum(self.parts.values())


def measure_profiles(
    contenders: Sequence[Contender],
    prompts: Prompts,
    networks: Mapping[str, Network],
    limits: Limits,
    sizes: Sizes,
    loads: Sequence[int] = LOADS,
) -> list[Profile]:
    """networks: by the names of ours in process."""
    found, context = [], sizes.prompt + sizes.out // 2
    for one in contenders:
        if "profile" not in one.operations:
            continue
        for batch in loads:
            try:
                work = prompts.make(batch, sizes.prompt)
                with Others(one.pids) as others:
                    parts = one.ask("profile", prompts=work, tokens=sizes.out)
            except ContenderFailed as error:
                print(f"  {error}", flush=True)
                continue
            least = limits.seconds(step_work(networks[one.name], batch, context))
            found.append(Profile(one.name, batch, parts, 1e3 * least, others.share))
    return found


def profile_rows(profiles: Sequence[Profile]) -> list[list[str]]:
    if not profiles:
        return [["no profile"]]
    names = list(profiles[0].parts)
    rows = [["", "sequences", "ms a step", *(f"{name} %" for name in names), "limit ms", "reached"]]
    for one in profiles:
        shares = (f"{100 * one.parts[name] / one.step_ms:.1f}" for name in names)
        limit = [number(one.least_ms), f"{one.least_ms / one.step_ms:.0%}"]
        rows.append([one.who, str(one.batch), number(one.step_ms), *shares, *limit])
    return rows


def limit_rows(limits: Limits) -> list[list[str]]:
    rows = [["this machine", "thousand millions a second"]]
    rows.append(["bytes read, as many as the weights", number(limits.bytes_s / 1e9)])
    rows.append(["bytes read, beyond all caches", number(limits.memory_s / 1e9)])
    return rows + [
        [f"operations, {name}", number(value / 1e9)] for name, value in limits.operations_s.items()
    ]

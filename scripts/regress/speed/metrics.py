"""What is measured of speed, and which way is better: the direction is part of a metric's type, so
that no list elsewhere can have it the wrong way round. Knows no server.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """key: of the limits file. unit: as it is told."""

    key: str
    says: str
    unit: str

    def goodness(self, old: float, new: float) -> float:
        """New over old so that more than 1 is better."""
        raise NotImplementedError


class HigherIsBetter(Metric):
    def goodness(self, old: float, new: float) -> float:
        return new / old


class LowerIsBetter(Metric):
    def goodness(self, old: float, new: float) -> float:
        return old / new


TOKENS_PER_S = HigherIsBetter("tokens_per_s", "output tokens a second", "tokens/s")
TTFT = LowerIsBetter("ttft_ms", "time to the first token", "ms")
STEP = LowerIsBetter("step_ms", "time between tokens", "ms")
START = LowerIsBetter("start_s", "time from start to ready", "s")
MEMORY = LowerIsBetter("memory_mib", "peak memory", "MiB")
METRICS: tuple[Metric, ...] = (TOKENS_PER_S, TTFT, STEP, START, MEMORY)

"""Samples of one run -> medians, ratios within a round, and what lies between a stream's tokens.

Pure arithmetic; knows no contender.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """busy: the share of the machine that others took meanwhile."""

    value: float
    busy: float


class Figures:
    """Samples by what was measured and of whom, one for each round."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[Sample]]] = {}

    def add(self, what: str, who: str, sample: Sample) -> None:
        self.samples.setdefault(what, {}).setdefault(who, []).append(sample)

    def of(self, what: str, who: str) -> list[Sample]:
        return self.samples.get(what, {}).get(who, [])

    def median(self, what: str, who: str) -> float | None:
        values = [sample.value for sample in self.of(what, who)]
        return statistics.median(values) if values else None

    def busy(self, what: str, who: str) -> float:
        """The median share of others; 0 of nothing."""
        shares = [sample.busy for sample in self.of(what, who)]
        return statistics.median(shares) if shares else 0.0

    def ratio(self, what: str, who: str, peer: str) -> float | None:
        """The median of the rounds' own ratios: what drifts from round to round is in neither."""
        pairs = zip(self.of(what, who), self.of(what, peer), strict=False)
        ratios = [ours.value / theirs.value for ours, theirs in pairs if theirs.value]
        return statistics.median(ratios) if ratios else None


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def gaps(
    times: Iterable[Sequence[float]], begin: float = 0.0, end: float = math.inf
) -> list[float]:
    """Seconds between neighbours of each stream, of gaps that are open between begin and end."""
    found = []
    for stream in times:
        for before, after in zip(stream, stream[1:], strict=False):
            if after > begin and before < end:
                found.append(after - before)
    return found

"""How long an engine's step takes, from a file of `enginehouse bench --json` or as given."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """One replica's. step_s: seconds of a step by the sequences that it gives a token each, linear
    between those that were measured and, beyond the last, on as between the last two.
    prefill_tokens_per_s: beside that. slots: sequences at once. chunk: prompt tokens of a step.
    cache_blocks: of block_tokens each, that a replica keeps of prompts and answers. jitter: a
    stretch of steps takes as long as that times a lognormal draw, whose logarithm deviates so much.
    """

    step_s: Mapping[int, float]
    prefill_tokens_per_s: float
    slots: int = 16
    chunk: int = 512
    cache_blocks: int = 4096
    block_tokens: int = 64
    jitter: float = 0.0
    _known: dict[int, float] = field(default_factory=dict)

    def step(self, batch: int) -> float:
        if batch not in self._known:
            self._known[batch] = self._interpolated(batch)
        return self._known[batch]

    def _interpolated(self, batch: int) -> float:
        if batch == 0:
            return 0.0
        sizes = sorted(self.step_s)
        if batch <= sizes[0] or len(sizes) == 1:
            return self.step_s[sizes[0]]
        at = min(bisect_left(sizes, batch), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        slope = (self.step_s[high] - self.step_s[low]) / (high - low)
        return self.step_s[low] + slope * (batch - low)


def read_steps(path: Path) -> dict[int, float]:
    """Of each level of clients, the median between two tokens: a step of so many sequences.

    ValueError for a file that has none.
    """
    levels = json.loads(path.read_text(encoding="utf-8")).get("levels", [])
    steps = {
        int(level["clients"]): level["inter_token_p50_ms"] / 1000
        for level in levels
        if level.get("inter_token_p50_ms")
    }
    if not steps:
        raise ValueError(
            f"{path} has no level with inter_token_p50_ms; make it with "
            "`enginehouse bench URL --json FILE`"
        )
    return steps

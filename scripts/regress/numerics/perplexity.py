"""Perplexity of one engine over another's, and whether the loss is more than these texts' luck.

Both scored the same tokens: what is resampled are blocks of neighbouring tokens' differences (the
paired block bootstrap; Kuensch 1989), as a token's loss depends on those before. Knows no server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 32  # or less, where there would be few
_LEAST_BLOCKS = 16
_MOST = 700.0  # nats, of which a float holds the exponential
_RESAMPLED = 4000
_SEED = 8


class Ratio(NamedTuple):
    """New perplexity over old; above 1 is worse. low, high: of the level's confidence."""

    ratio: float
    low: float
    high: float


def perplexity(chosen: Sequence[float]) -> float:
    """Of log probabilities, nats."""
    return math.exp(min(-math.fsum(chosen) / len(chosen), _MOST))


def perplexity_ratio(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], level: float
) -> Ratio:
    """Texts' log probabilities, nats, token by token of the same tokens; at least one text."""
    size = max(1, min(_BLOCK, sum(map(len, old)) // _LEAST_BLOCKS))
    blocks = []
    for before, after in zip(old, new, strict=True):
        losses = np.asarray(before) - np.asarray(after)
        blocks += [losses[i : i + size] for i in range(0, len(losses), size)]
    sums = np.asarray([block.sum() for block in blocks])
    counts = np.asarray([len(block) for block in blocks])
    picks = np.random.default_rng(_SEED).integers(0, len(sums), (_RESAMPLED, len(sums)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = sums.sum() / counts.sum()
    return Ratio(*(math.exp(min(float(value), _MOST)) for value in (mean, low, high)))

"""Is it settled? A ratio's interval from pairs of turns, and what it says: better, same, worse.

The interval is the percentile bootstrap's of the median of the pairs' ratios (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13): a pair's turns stood side by side, so what the
machine did meanwhile happened to both. Same is shown, not assumed: the whole interval has to lie
within the margin (two one-sided tests); what only is not worse is told as that. Knows no server and
no metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

_RESAMPLED = 4000
_SEED = 8


class Interval(NamedTuple):
    """ratio: the estimate. low, high: where it lies with the level's confidence."""

    ratio: float
    low: float
    high: float


class Answer(str, Enum):
    BETTER = "better"
    SAME = "same"
    NOT_WORSE = "same or better"
    WORSE = "worse"
    CANNOT_TELL = "cannot tell"


def paired_interval(ratios: Sequence[float], level: float) -> Interval:
    """Of the median of positive ratios, one of each pair."""
    values = np.asarray(ratios, dtype=np.float64)
    picks = np.random.default_rng(_SEED).integers(0, len(values), (_RESAMPLED, len(values)))
    return _interval(float(np.median(values)), np.median(values[picks], axis=1), level)


def unpaired_interval(new: Sequence[float], old: Sequence[float], level: float) -> Interval:
    """Of median(new) / median(old), where the two were not measured side by side."""
    random = np.random.default_rng(_SEED)

    def medians(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        picks = random.integers(0, len(array), (_RESAMPLED, len(array)))
        return np.asarray(np.median(array[picks], axis=1))

    ratio = float(np.median(new) / np.median(old))
    return _interval(ratio, medians(new) / medians(old), level)


def _interval(ratio: float, resampled: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(ratio, float(low), float(high))


def settle(goodness: Interval, margin: float) -> Answer:
    """goodness: new over old, more than 1 better. margin: what counts as the same, such as 0.05."""
    worst, best = 1 - margin, 1 + margin
    if goodness.high < worst:
        return Answer.WORSE
    if goodness.low > best:
        return Answer.BETTER
    if worst <= goodness.low and goodness.high <= best:
        return Answer.SAME
    return Answer.NOT_WORSE if worst <= goodness.low else Answer.CANNOT_TELL


def settle_by_now(goodness: Interval, margin: float, num_pairs: int, to_differ: int) -> Answer:
    """`settle`, after so many pairs: before `to_differ` of them nothing is better or worse, as who
    looks again and again will see luck; but for what lies beyond three margins.
    """
    answer = settle(goodness, margin)
    if answer not in (Answer.WORSE, Answer.BETTER) or num_pairs >= to_differ:
        return answer
    if settle(goodness, 3 * margin) is answer:
        return answer
    return Answer.NOT_WORSE if answer is Answer.BETTER else Answer.CANNOT_TELL


def pairs_to_settle(goodness: Interval, margin: float, num_pairs: int) -> int | None:
    """How many more pairs would tell if it is worse, should the estimate stay: intervals narrow by
    the root of their number. None where the estimate lies on the margin, which no number settles.
    """
    distance = abs(goodness.ratio - (1 - margin))
    if distance < 0.001:
        return None
    above = goodness.ratio > 1 - margin
    reach = goodness.ratio - goodness.low if above else goodness.high - goodness.ratio
    return max(0, math.ceil(num_pairs * (reach / distance) ** 2) - num_pairs)

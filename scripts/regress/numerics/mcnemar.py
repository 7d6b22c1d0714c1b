"""Has an engine lost tasks that the other solves? McNemar's exact test, one-sided.

Only tasks that exactly one of the two solves tell anything: were they equally good, each of these
would fall either way like a coin (McNemar 1947; the exact binomial form). Knows no task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """lost: solved by the old alone; gained: by the new alone. p: the chance of at least so many
    lost, were the two equally good.
    """

    lost: int
    gained: int
    p: float


def compare_solved(old: Sequence[bool], new: Sequence[bool]) -> Comparison:
    """Of the same tasks, in one order."""
    pairs = list(zip(old, new, strict=True))
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    one_sided = lost + gained
    tail = sum(math.comb(one_sided, k) for k in range(lost, one_sided + 1))
    return Comparison(lost, gained, tail / 2**one_sided)


def least_loss_seen(level: float) -> int:
    """How many tasks have to be lost, and none gained, to be seen: p is 2 ** -lost."""
    return math.ceil(-math.log2(level))

"""Two servers take turns until it is settled which is faster: A B B A, never A and then B.

What the machine does meanwhile (another job, heat, a neighbour) falls on both. A load goes on until
each of its metrics is settled, or its turns or seconds are over. Knows no limit of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from enginehouse.regress.speed.metrics import STEP, TOKENS_PER_S, TTFT, Metric
from enginehouse.regress.speed.settling import Answer, Interval, paired_interval, settle
from enginehouse.regress.speed.turn import Turn
from enginehouse.runtime.errors import EnginehouseError

Asked = str | list[int]

OF_A_TURN: dict[Metric, Callable[[Turn], float | None]] = {
    TOKENS_PER_S: lambda turn: turn.tokens_per_s,
    TTFT: lambda turn: turn.ttft,
    STEP: lambda turn: turn.step,
}


class Pair(NamedTuple):
    """Turns that stood side by side, asked the same."""

    old: Turn
    new: Turn


class Patience(NamedTuple):
    """least, most: pairs of a load; to_differ: before so many none is better or worse. seconds: of
    a load, after its least pairs; twice as many where the new one seems to be worse.
    """

    least: int
    most: int
    to_differ: int
    seconds: float


@dataclass
class LoadTurns:
    """All pairs at one number of clients."""

    clients: int
    pairs: list[Pair] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # old or new, and what it said

    def goodness(self, metric: Metric) -> list[float]:
        """Each pair's ratio, more than 1 better; [] where a turn has no such figure."""
        of = OF_A_TURN[metric]
        figures = [(of(pair.old), of(pair.new)) for pair in self.pairs]
        if any(not old or not new for old, new in figures):
            return []
        return [metric.goodness(old, new) for old, new in figures if old and new]

    def interval(self, metric: Metric, level: float) -> Interval | None:
        ratios = self.goodness(metric)
        return paired_interval(ratios, level) if ratios else None

    def answers(self, margins: dict[str, float], level: float) -> set[Answer]:
        """Of all its metrics, however few the pairs."""
        found = ((metric, self.interval(metric, level)) for metric in OF_A_TURN)
        return {settle(interval, margins[metric.key]) for metric, interval in found if interval}


def take_turns(
    clients: int,
    old: Callable[[Sequence[Asked]], Turn],
    new: Callable[[Sequence[Asked]], Turn],
    prompts_of: Callable[[int], Sequence[Asked]],
    margins: dict[str, float],
    level: float,
    patience: Patience,
    advance: Callable[[LoadTurns], None] = lambda load: None,
) -> LoadTurns:
    """prompts_of(number of a pair): what both of it are asked. One pair before them is not counted:
    it warms both up. A side that fails ends the load, and is told.
    """
    load = LoadTurns(clients)
    began = time.monotonic()
    for number, old_first in zip(count(), _order()):
        prompts, found = prompts_of(number), dict[str, Turn]()
        sides = {"old": old, "new": new}
        for side in ("old", "new") if old_first else ("new", "old"):
            try:
                found[side] = sides[side](prompts)
            except EnginehouseError as error:
                load.failed[side] = str(error)
        if load.failed:
            return load
        pair = Pair(found["old"], found["new"])
        if number == 0:
            continue
        load.pairs.append(pair)
        advance(load)
        if len(load.pairs) < patience.least or len(load.pairs) % 2:
            continue
        answers = load.answers(margins, level)
        differ = Answer.WORSE in answers
        enough = len(load.pairs) >= (patience.to_differ if differ else patience.least)
        seconds = patience.seconds * (2 if differ else 1)
        over = time.monotonic() - began > seconds or len(load.pairs) >= patience.most
        if over or (enough and Answer.CANNOT_TELL not in answers):
            return load
    raise AssertionError("the order of turns has no end")


def _order() -> Iterator[bool]:
    """Whether the old goes first: A B, B A, A B, ..."""
    old_first = True
    while True:
        yield old_first
        old_first = not old_first

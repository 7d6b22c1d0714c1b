"""Better, same, worse or cannot tell, of each metric at each load. Knows no server."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from enginehouse.regress.findings import Figure, Finding, Status
from enginehouse.regress.judge.comparison import Comparison, found, not_judged
from enginehouse.regress.limits import Limits
from enginehouse.regress.speed.metrics import MEMORY, START, STEP, Metric
from enginehouse.regress.speed.settling import (
    Answer,
    Interval,
    paired_interval,
    pairs_to_settle,
    settle,
    settle_by_now,
    unpaired_interval,
)
from enginehouse.regress.speed.turns import OF_A_TURN, LoadTurns

GROUP = "speed"
_FINEST_MS = 1.0
_STATUS = {
    Answer.BETTER: Status.PASSED,
    Answer.SAME: Status.PASSED,
    Answer.NOT_WORSE: Status.PASSED,
    Answer.WORSE: Status.REGRESSED,
    Answer.CANNOT_TELL: Status.CANNOT_TELL,
}


def judge_turns(loads: Sequence[LoadTurns], limits: Limits) -> Iterator[Finding]:
    """Of engines that took turns."""
    for load in loads:
        for metric, of in OF_A_TURN.items():
            check = f"{metric.key}.{load.clients}"
            interval = load.interval(metric, limits.level)
            if interval is None:
                yield not_judged(GROUP, check, "Answers came in one piece, with nothing between.")
                continue
            old = statistics.median(of(pair.old) or 0 for pair in load.pairs)
            new = statistics.median(of(pair.new) or 0 for pair in load.pairs)
            where = f"{load.clients} at once, {len(load.pairs)} pairs of turns"
            margin = limits.speed[metric.key]
            num_pairs, to_differ = len(load.pairs), limits.turns.to_differ
            yield _judged(
                check, metric, old, new, interval, margin, num_pairs, where, limits, to_differ
            )


def judge_starts(old: Sequence[float], new: Sequence[float], limits: Limits) -> Iterator[Finding]:
    """Seconds to ready, each old's beside a new's."""
    if not old or not new:
        return
    interval = paired_interval(
        [START.goodness(a, b) for a, b in zip(old, new, strict=True)], limits.level
    )
    margin = limits.speed[START.key]
    yield _judged(
        START.key,
        START,
        statistics.median(old),
        statistics.median(new),
        interval,
        margin,
        len(new),
        f"{len(new)} pairs of starts",
        limits,
        to_differ=1,
    )


def judge_memory(both: Comparison) -> Iterator[Finding]:
    """Peaks of the same asks, each measured once: they have no interval."""
    new = both.new.head.peak_bytes
    old = both.old.head.peak_bytes if both.old else None
    if new is None or old is None:
        if new is not None:
            yield not_judged(GROUP, MEMORY.key, f"Peak memory {new / 2**20:.0f} MiB.")
        return
    margin = both.limits.speed[MEMORY.key]
    goodness = MEMORY.goodness(old, new)
    sentence = (
        f"Peak memory {new / 2**20:.0f} MiB, {old / 2**20:.0f} before; wanted at most "
        f"{100 * margin:g} % more."
    )
    passed = goodness >= 1 / (1 + margin)
    yield found(GROUP, MEMORY.key, passed, sentence, old=old / 2**20, new=new / 2**20)


def judge_recorded(both: Comparison) -> Iterator[Finding]:
    """Of an old engine whose turns were recorded: on the same machine, by a wide margin, as
    nobody knows what the machine did then.
    """
    if both.old is None or not both.old.turns or not both.new.turns:
        return
    if both.old.head.machine != both.new.head.machine:
        yield not_judged(
            GROUP,
            "recorded",
            "The baseline's figures are another machine's; an engine as --baseline takes turns.",
        )
        return
    margin, level = both.limits.recorded_margin, both.limits.level
    for clients in sorted({turn.clients for turn in both.new.turns}):
        for metric, of in OF_A_TURN.items():
            old = [v for turn in both.old.turns if turn.clients == clients and (v := of(turn))]
            new = [v for turn in both.new.turns if turn.clients == clients and (v := of(turn))]
            if not old or not new:
                continue
            if metric is STEP and statistics.median(old) < _FINEST_MS:
                why = (
                    "Steps of less than a millisecond are the connection's more than the engine's."
                )
                yield not_judged(GROUP, f"{metric.key}.{clients}", why)
                continue
            ratio, low, high = unpaired_interval(new, old, level)
            sides = sorted(metric.goodness(1.0, value) for value in (low, high))
            goodness = Interval(metric.goodness(1.0, ratio), *sides)
            answer = settle(goodness, margin)
            status = Status.REGRESSED if answer is Answer.WORSE else Status.PASSED
            sentence = (
                f"{metric.says} at {clients}: {statistics.median(new):.4g} {metric.unit}, "
                f"recorded {statistics.median(old):.4g}; only a loss of over {100 * margin:g} % "
                "counts, as no turns could be taken."
            )
            figures: dict[str, Figure] = {
                "old": statistics.median(old),
                "new": statistics.median(new),
            }
            yield Finding(GROUP, f"{metric.key}.{clients}", status, sentence, figures)


def _judged(
    check: str,
    metric: Metric,
    old: float,
    new: float,
    goodness: Interval,
    margin: float,
    num_pairs: int,
    where: str,
    limits: Limits,
    to_differ: int,
) -> Finding:
    answer = settle_by_now(goodness, margin, num_pairs, to_differ)
    sentence = (
        f"{metric.says}, {where}: {new:.4g} {metric.unit}, {old:.4g} before; {goodness.ratio:.3f} "
        f"times as good, between {goodness.low:.3f} and {goodness.high:.3f} ({limits.level:.0%}): "
        f"{answer.value}, by a margin of {100 * margin:g} %"
    )
    if answer is Answer.CANNOT_TELL:
        more = pairs_to_settle(goodness, margin, num_pairs)
        sentence += (
            "; it lies on the margin, where no number of turns settles it"
            if more is None
            else f"; about {max(1, more)} more pairs would settle it"
        )
    figures = {
        "old": old,
        "new": new,
        "goodness": goodness.ratio,
        "low": goodness.low,
        "high": goodness.high,
    }
    return Finding(GROUP, check, _STATUS[answer], f"{sentence}.", {**figures, "margin": margin})

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
        if load.failed:
            yield _of_failure(load)
            continue
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


def _of_failure(load: LoadTurns) -> Finding:
    check, told = (
        f"streams.{load.clients}",
        "; ".join(f"the {side} engine: {said}" for side, said in sorted(load.failed.items())),
    )
    sentence = f"At {load.clients} at once no turns could be taken: {told}"
    if "old" in load.failed:
        return not_judged(GROUP, check, sentence)
    return found(GROUP, check, False, f"{sentence}; the old engine streams.")


def judge_starts(old: Sequence[float], new: Sequence[float], limits: Limits) -> Iterator[Finding]:
    """Seconds to ready, each old's beside a new's."""
    if not old or not new:
        why = "No starts were timed: engine directories alone are started here, two in turns."
        yield not_judged(GROUP, START.key, why)
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
    if new is None:
        yield not_judged(GROUP, MEMORY.key, "A server elsewhere does not tell its memory.")
        return
    told = f"Peak memory {new / 2**20:.0f} MiB"
    if both.old is None or old is None:
        yield not_judged(GROUP, MEMORY.key, f"{told}.")
        return
    if why := _otherwise_asked(both):
        yield not_judged(GROUP, MEMORY.key, f"{told}, {old / 2**20:.0f} before; {why}.")
        return
    margin = both.limits.speed[MEMORY.key]
    goodness = MEMORY.goodness(old, new)
    sentence = f"{told}, {old / 2**20:.0f} before; wanted at most {100 * margin:g} % more."
    passed = goodness >= 1 / (1 + margin)
    yield found(GROUP, MEMORY.key, passed, sentence, old=old / 2**20, new=new / 2**20)


def judge_recorded(both: Comparison) -> Iterator[Finding]:
    """Of an old engine whose turns were recorded: on the same machine, by a wide margin, as
    nobody knows what the machine did then.
    """
    if both.old is None:
        return
    if not both.new.turns:
        if both.old.turns and (why := both.new.head.left_out.get("turns")):
            yield found(GROUP, "streams", False, f"The old engine streams, the new one not: {why}.")
        return
    if why := _otherwise_asked(both) or ("" if both.old.turns else "it has no turns"):
        sentence = (
            f"The baseline's speed is not compared: {why}; an engine as --baseline takes turns."
        )
        yield not_judged(GROUP, "recorded", sentence)
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
            status = _status_of_recorded(goodness, both.limits.recorded_same, margin)
            sentence = (
                f"{metric.says} at {clients}: {statistics.median(new):.4g} {metric.unit}, "
                f"recorded {statistics.median(old):.4g}: {goodness.ratio:.3f} times as good; "
                f"without turns {1 - both.limits.recorded_same:g} and more may be the machine's "
                f"doing, and less than {1 - margin:g} is not."
            )
            figures: dict[str, Figure] = {
                "old": statistics.median(old),
                "new": statistics.median(new),
            }
            yield Finding(GROUP, f"{metric.key}.{clients}", status, sentence, figures)


def _status_of_recorded(goodness: Interval, same: float, margin: float) -> Status:
    if settle(goodness, margin) is Answer.WORSE:
        return Status.REGRESSED
    return Status.PASSED if goodness.ratio >= 1 - same else Status.CANNOT_TELL


def _otherwise_asked(both: Comparison) -> str:
    """Why two engines' figures say nothing of each other, or ""."""
    assert both.old is not None
    old, new = both.old.head, both.new.head
    if not old.machine or not new.machine:
        return "it is not known what machine it was"
    if not both.same_machine:
        return "it was another machine"
    if sorted(old.groups) != sorted(new.groups):
        return f"it was asked otherwise, {', '.join(old.groups) or 'nothing'}"
    return "" if old.loads == new.loads else "its turns were of other loads"


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

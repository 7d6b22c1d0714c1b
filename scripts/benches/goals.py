"""What is to be reached beside OpenVINO GenAI, and whether it was; the tables as Markdown.

Knows figures by name; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benches.figures import Figures
from benches.quiet import LIMIT

PEER = "openvino"
THROUGHPUT = "tokens/s, {} sequences"
TTFT, PREFILL = "ms to the first of 512 tokens", "prefill tokens/s"
MEMORY, READY = "peak MiB at 16", "seconds from start to ready"
GAP, LATE_GAP = "ms between tokens, median", "ms between tokens, p99 while 2,000 tokens arrive"
_BY_LOAD = {
    "in process, int8": ("int8", (2.2, 1.8, 1.7, 1.6, 1.5)),
    "in process, bf16": ("bf16", (1.6, 1.3, 1.25, 1.15, 1.1)),
    "through HTTP": ("http", (1.6, 1.4, 1.3, 1.3, 1.3)),
}
PROFILED = 16  # sequences
PART = "{} at 16, % of a step"
ITSELF = "itself"
LOADS = (1, 4, 8, 16, 32)


class Goal(NamedTuple):
    """bound: of the figure's ratio to the peer's, or, where there is `base`, to that of one's own;
    of the figure itself where base is ITSELF.
    """

    title: str
    what: str
    who: str
    bound: float
    at_least: bool = False
    base: str | None = None


class Verdict(NamedTuple):
    """met None: it was not measured. quiet: others were idle while it was."""

    goal: Goal
    found: float | None
    met: bool | None
    quiet: bool = True


def goals(ours: Sequence[str]) -> Iterator[Goal]:
    """ours: the names of our contenders."""
    for title, (kind, bounds) in _BY_LOAD.items():
        for name in (name for name in ours if name.startswith(kind)):
            for load, bound in zip(LOADS, bounds, strict=True):
                what = THROUGHPUT.format(load)
                yield Goal(f"{title}, {load} at once", what, name, bound, True)
    for name in ours:
        if not name.startswith("http"):
            yield Goal(f"{name}: first token of 512", TTFT, name, 0.7)
            yield Goal(f"{name}: prefill", PREFILL, name, 1.4, True)
            yield Goal(f"{name}: ready, seconds", READY, name, 1.5, base=ITSELF)
            for part in ("sampling", "scheduling"):
                what = PART.format(part)
                yield Goal(f"{name}: {part} at 16, %", what, name, 5.0, base=ITSELF)
        yield Goal(f"{name}: memory", MEMORY, name, 1.0)
        yield Goal(f"{name}: ready", READY, name, 0.5)
        yield Goal(f"{name}: evenness, of the median", LATE_GAP, name, 2.5, base=GAP)


def judge(goal: Goal, figures: Figures) -> Verdict:
    whats = [goal.what] + ([goal.base] if goal.base else [])
    whos = [goal.who] + ([PEER] if goal.base is None else [])
    quiet = all(figures.busy(what, who) <= LIMIT for what in whats for who in whos)
    found: float | None
    if goal.base is None:
        found = figures.ratio(goal.what, goal.who, PEER)
    else:
        found, base = (figures.median(what, goal.who) for what in (goal.what, goal.base))
        if goal.base != ITSELF and found is not None:
            found = found / base if base else None
    if found is None:
        return Verdict(goal, None, None)
    return Verdict(
        goal, found, found >= goal.bound if goal.at_least else found <= goal.bound, quiet
    )


def verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    rows = [["goal", "wanted", "found", ""]]
    for goal, found, met, quiet in verdicts:
        sign, times = ">=" if goal.at_least else "<=", "" if goal.base == ITSELF else "x"
        cell = "-" if found is None else f"{found:.2f}{times}"
        noise = "" if quiet else ", not quiet"
        rows.append([goal.title, f"{sign} {goal.bound:g}{times}", cell, words[met] + noise])
    return rows


def figure_rows(figures: Figures) -> list[list[str]]:
    """A line for each thing measured: medians, how many rounds, and others' share where it was
    more than `quiet.LIMIT`.
    """
    names = list(dict.fromkeys(name for by in figures.samples.values() for name in by))
    rows = [["", *names]]
    for what in figures.samples:
        cells = [what]
        for name in names:
            median, busy = figures.median(what, name), figures.busy(what, name)
            rounds = len(figures.of(what, name))
            cell = "-" if median is None else f"{number(median)} ({rounds})"
            cells.append(cell + (f", others {busy:.0%}" if busy > LIMIT else ""))
        rows.append(cells)
    return rows


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

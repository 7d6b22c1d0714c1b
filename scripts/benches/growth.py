"""How a decode step grows with the batch and with the context: figures, a table and a plot.

Contexts are real: prompts of that length are computed first. Of ours in process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benches import peers
from benches.contender import HERE, Contender, ContenderFailed
from benches.figures import gaps, percentile
from benches.goals import number
from benches.prompts import Prompts

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048, 8192)
_SHORT = 128
_BESIDE = (1, 4)  # sequences that have a long context at once
_OUT = 24  # tokens, beside all others
_AT_ONCE = 512  # tokens of prompts in one iteration


class Point(NamedTuple):
    """step_ms: the median time between a sequence's tokens, once all prompts are computed."""

    who: str
    batch: int
    context: int
    step_ms: float


def measure_growth(
    contenders: Sequence[Contender],
    prompts: Prompts,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
) -> list[Point]:
    points = []
    cases = [(batch, _SHORT) for batch in batches]
    cases += [(batch, context) for context in contexts[1:] for batch in _BESIDE]
    for batch, context in cases:
        # The first is answered while the others' prompts are computed.
        out = _OUT + batch * context // _AT_ONCE
        work = prompts.make(batch, context - out)
        for one in contenders:
            if "profile" not in one.operations:
                continue
            try:
                times = one.ask("steps", prompts=work, tokens=out, bounded=False)["times"]
            except ContenderFailed as error:
                print(f"  {error}", flush=True)
                continue
            begin = max(stream[0] for stream in times)
            step_ms = 1e3 * percentile(gaps((s[1:] for s in times), begin), 0.5)
            points.append(Point(one.name, batch, context, step_ms))
            print(f"{batch} x {context} tokens, {one.name}: {number(step_ms)} ms", flush=True)
    return points


def growth_rows(points: Sequence[Point]) -> list[list[str]]:
    names = list(dict.fromkeys(point.who for point in points))
    found = {(point.who, point.batch, point.context): point for point in points}
    rows = [["sequences", "context", *(f"{name}: ms a step, tokens/s" for name in names)]]
    for batch, context in dict.fromkeys((point.batch, point.context) for point in points):
        cells = [str(batch), f"{context:,}"]
        for name in names:
            point = found.get((name, batch, context))
            cells.append(
                "-"
                if point is None
                else f"{number(point.step_ms)}, {number(1e3 * batch / point.step_ms)}"
            )
        rows.append(cells)
    return rows


def plot(points: Sequence[Point], image: Path, folder: Path) -> None:
    """matplotlib draws, in an environment of its own below `folder`."""
    python = peers.python_of(peers.PLOT, folder)
    data = json.dumps([point._asdict() for point in points])
    command = [str(python), str(HERE / "run_plot.py"), str(image)]
    subprocess.run(command, input=data, text=True, check=True, timeout=120)

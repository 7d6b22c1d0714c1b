"""The curves of an outcome -> plots with a title and a caption. Judges nothing.

What is long is thinned before it is drawn: 4,000 positions to 240 places, of which each keeps its
mean and its largest, and a distribution to 200 of its quantiles.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from enginehouse.build.report.axes import Axis, linear_axis, logarithmic_axis, named_axis
from enginehouse.build.report.drawing import Drawing, Point
from enginehouse.build.report.templates import Plot
from enginehouse.build.report.words import one_line
from enginehouse.regress.outcome import LoadFigures, PerplexityRatio, TextDivergence
from enginehouse.regress.report.wording import figure

_PLACES, _QUANTILES, _DOTTED = 240, 200, 40
_DECADES = 6
_MOST_ROWS = 40


class Divergence(NamedTuple):
    """plots: of texts that diverge somewhere. alike: the others' names, with their positions."""

    plots: list[Plot]
    alike: list[str]


def divergence_plots(texts: Sequence[TextDivergence], against: str) -> Divergence:
    """KL by position, a plot for each text on one scale, the largest mean first."""
    known = [(text, _finite(text.kl)) for text in texts if any(text.kl)]
    known = [(text, points) for text, points in known if points]
    known.sort(key=lambda pair: statistics.fmean(kl for _, kl in pair[1]), reverse=True)
    scale = [kl for _, points in known for _, kl in points]
    y = logarithmic_axis("KL divergence, nats", scale, _DECADES)
    return Divergence(
        [_divergence_plot(text, points, y, against) for text, points in known],
        [f"{one_line(text.text, 60)} ({len(text.kl):,})" for text in texts if not any(text.kl)],
    )


def _divergence_plot(text: TextDivergence, points: Sequence[Point], y: Axis, against: str) -> Plot:
    values = [kl for _, kl in points]
    position, largest = max(points, key=lambda point: point[1])
    caption = (
        f"{len(text.kl):,} positions; mean {figure(statistics.fmean(values))}, largest "
        f"{figure(largest)} at position {int(position):,}"
    )
    if len(values) < len(text.kl):
        caption += f"; {len(text.kl) - len(values):,} are no finite number, and are left out"
    title = one_line(text.text, 60)
    x = linear_axis("position, tokens", 0, max(len(text.kl) - 1, 1))
    drawing = Drawing(f"KL divergence from the {against} on {title}: {caption}.", x, y)
    pieces = _pieces(points, _PLACES)
    middles = [statistics.fmean(at for at, _ in piece) for piece in pieces]
    means = [statistics.fmean(kl for _, kl in piece) for piece in pieces]
    line = list(zip(middles, means, strict=True))
    if len(pieces) < len(points):
        peaks = [max(kl for _, kl in piece) for piece in pieces]
        drawing.band(line, list(zip(middles, peaks, strict=True)), "new")
    drawing.line(line, "new")
    if len(points) <= _DOTTED:
        drawing.dots(points, "new")
    return Plot(title, caption, drawing.svg())


def perplexity_plot(ratios: Sequence[PerplexityRatio]) -> Plot | None:
    """Each ratio with its interval, and the line at 1; None where there is nothing to show."""
    known = [row for row in ratios if math.isfinite(row.low + row.ratio + row.high)][:_MOST_ROWS]
    if not known:
        return None
    above = sum(row.low > 1 for row in known)
    caption = (
        f"New over old, with its interval: above 1 is worse. The interval lies above 1 for {above} "
        f"of {len(known)}; a hollow mark's holds 1."
    )
    if len(known) < len(ratios):
        caption += f" Another {len(ratios) - len(known)} are in report.json only."
    low, high = min(1.0, *(row.low for row in known)), max(1.0, *(row.high for row in known))
    free = (high - low) / 20 or 0.01
    x = linear_axis("perplexity, new / old", low - free, high + free)
    y = Axis("", 0, len(known), ())
    drawing = Drawing(f"Perplexity ratios. {caption}", x, y, height=62 + 36 * len(known), left=20)
    drawing.upright(1, "one")
    for number, row in enumerate(known):
        place = len(known) - number - 0.75
        holds = row.low <= 1 <= row.high
        drawing.word(one_line(row.texts, 24), place + 0.38)
        drawing.word(
            f"{row.ratio:.4f} ({row.low:.4f} to {row.high:.4f})", place + 0.38, at_end=True
        )
        drawing.line([(row.low, place), (row.high, place)], "new")
        drawing.dots([(row.ratio, place)], "new hollow" if holds else "new")
    return Plot("Perplexity ratios", caption, drawing.svg())


def latency_plots(loads: Sequence[LoadFigures]) -> list[Plot]:
    """At each load, how the times to the first token and between tokens are distributed."""
    plots = []
    for load in loads:
        for what, old, new in (
            ("time to the first token", load.old_ttft_ms, load.new_ttft_ms),
            ("time between tokens", load.old_gap_ms, load.new_gap_ms),
        ):
            if known := _distributions(old, new):
                plots.append(_latency_plot(f"{what}, {_clients(load)}", what, known))
    return plots


def _latency_plot(title: str, what: str, known: dict[str, list[float]]) -> Plot:
    low = min(values[0] for values in known.values())
    high = max(values[math.ceil(0.99 * len(values)) - 1] for values in known.values())
    caption = "; ".join(
        f"{of}: {len(values):,} measured, median {figure(statistics.median(values))} ms, largest "
        f"{figure(values[-1])} ms"
        for of, values in known.items()
    )
    x = linear_axis(f"{what}, ms (to the 99th percentile)", low, high)
    y = Axis("share of the times", 0, 1, ((0, "0 %"), (0.5, "50 %"), (1, "100 %")))
    drawing = Drawing(f"Distribution of the {title}. {caption}.", x, y)
    for of, values in known.items():
        drawing.line(_steps(values, high), of)
    return Plot(title[0].upper() + title[1:], caption, drawing.svg())


def load_plot(loads: Sequence[LoadFigures]) -> Plot | None:
    """Tokens per second by clients: every turn a dot, medians a line."""
    rates = [(load, _distributions(load.old_tokens_per_s, load.new_tokens_per_s)) for load in loads]
    known = [(load, sides) for load, sides in rates if sides]
    if not known:
        return None
    top = max(values[-1] for _, sides in known for values in sides.values())
    x = named_axis("clients at once", [f"{load.clients:,}" for load, _ in known])
    y = linear_axis("tokens/s, of all clients", 0, top, to_tick=True)
    caption = "Every dot is a turn, the line their median."
    drawing = Drawing(f"Tokens per second by number of clients. {caption}", x, y, height=240)
    for of, beside in (("old", -0.05), ("new", 0.05)):
        turns = [(place, sides[of]) for place, (_, sides) in enumerate(known) if of in sides]
        drawing.line([(place, statistics.median(values)) for place, values in turns], of)
        drawing.dots([(place + beside, value) for place, values in turns for value in values], of)
    return Plot("Load curve", caption, drawing.svg())


class LoadRow(NamedTuple):
    """Medians of one load, as text: old, new and new over old of each of three figures."""

    clients: str
    cells: list[str]


def load_rows(loads: Iterable[LoadFigures]) -> list[LoadRow]:
    return [
        LoadRow(
            f"{load.clients:,}",
            [
                *_medians(load.old_tokens_per_s, load.new_tokens_per_s),
                *_medians(load.old_ttft_ms, load.new_ttft_ms),
                *_medians(load.old_gap_ms, load.new_gap_ms),
            ],
        )
        for load in loads
    ]


def _medians(old: list[float], new: list[float]) -> list[str]:
    former, latter = (statistics.median(values) if values else None for values in (old, new))
    ratio = latter / former if former and latter is not None else None
    return [figure(former), figure(latter), "–" if ratio is None else f"× {ratio:.3f}"]


def _distributions(old: list[float], new: list[float]) -> dict[str, list[float]]:
    """Sorted, by whose they are; without a side of which nothing is known."""
    sides = {"old": old, "new": new}
    known = {of: sorted(filter(math.isfinite, values)) for of, values in sides.items()}
    return {of: values for of, values in known.items() if values}


def _steps(values: Sequence[float], high: float) -> list[Point]:
    """The corners of the distribution function up to `high`, thinned. values: sorted."""
    number = min(len(values), _QUANTILES)
    indices = [round((step + 1) / number * len(values)) - 1 for step in range(number)]
    corners, share = [], 0.0
    for index in indices:
        if values[index] > high:
            break
        corners.append((values[index], share))
        share = (index + 1) / len(values)
        corners.append((values[index], share))
    return corners


def _finite(values: Sequence[float]) -> list[Point]:
    """Position and value; KL that rounding made negative is 0."""
    return [(at, max(0.0, value)) for at, value in enumerate(values) if math.isfinite(value)]


def _pieces(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    each = math.ceil(len(points) / most)
    return [points[start : start + each] for start in range(0, len(points), each)]


def _clients(load: LoadFigures) -> str:
    return f"{load.clients:,} client{'' if load.clients == 1 else 's'}"

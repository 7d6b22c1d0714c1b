"""Plots against the numbers that they show: nothing lost that a reader would miss."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from enginehouse.build.report.axes import linear_axis, logarithmic_axis, named_axis
from enginehouse.regress.outcome import LoadFigures, PerplexityRatio, TextDivergence
from enginehouse.regress.report import plots

Pairs = list[tuple[float, float]]


def points_of(svg: str, kind: str, of: str) -> Pairs:
    """Of the first line or band of that side, in the drawing's units; y grows downwards."""
    tag = {"line": "polyline", "band": "polygon"}[kind]
    [element, *_] = [
        element
        for element in ElementTree.fromstring(svg).iter(tag)
        if element.get("class") == f"{kind} {of}"
    ]
    return [
        (float(x), float(y))
        for x, y in (point.split(",") for point in element.get("points", "").split())
    ]


def ticks_of(svg: str) -> dict[str, tuple[float, float]]:
    return {
        element.text or "": (float(element.get("x", 0)), float(element.get("y", 0)) - 4)
        for element in ElementTree.fromstring(svg).iter("text")
    }


def test_one_bad_position_among_4000_is_seen() -> None:
    curve = [1e-3] * 4000
    curve[1234] = 1.0
    [plot] = plots.divergence_plots([TextDivergence("prose", curve)], "baseline").plots
    assert "largest 1 at position 1,234" in plot.caption
    assert len(points_of(plot.svg, "line", "new")) <= 240
    x, y = min(points_of(plot.svg, "band", "new"), key=lambda point: point[1])
    ticks = ticks_of(plot.svg)
    assert y == ticks["1"][1], "the band reaches the peak"
    start, end = ticks["0"][0], ticks["3,000"][0]
    assert abs(x - (start + 1234 / 3000 * (end - start))) < 3


def test_texts_share_a_scale_and_stand_by_their_mean() -> None:
    texts = [TextDivergence("small", [1e-4] * 8), TextDivergence("large", [1e-1] * 8)]
    large, small = plots.divergence_plots(texts, "baseline").plots
    assert (large.title, small.title) == ("large", "small")
    assert "10⁻³" in ticks_of(large.svg) and "10⁻³" in ticks_of(small.svg)
    heights = [points_of(plot.svg, "line", "new")[0][1] for plot in (large, small)]
    assert heights[0] < heights[1]


def test_a_text_without_divergence_is_named_and_not_drawn() -> None:
    texts = [TextDivergence("same", [0.0] * 1234), TextDivergence("almost", [0.0, 1e-9, -1e-12])]
    found = plots.divergence_plots(texts, "baseline")
    assert found.alike == ["same (1,234)"]
    [plot] = found.plots
    assert plot.title == "almost" and "at position 1" in plot.caption
    assert max(y for _, y in points_of(plot.svg, "line", "new")) == 172, "0 is on the lower end"
    assert any(text.startswith("≤") for text in ticks_of(plot.svg))


def test_what_is_no_finite_number_is_left_out_and_told() -> None:
    texts = [TextDivergence("half", [0.5, math.nan, math.inf]), TextDivergence("none", [math.nan])]
    [plot] = plots.divergence_plots(texts, "reference").plots
    assert "3 positions; mean 0.5" in plot.caption and "2 are no finite number" in plot.caption


def test_an_interval_that_holds_1_is_hollow() -> None:
    rows = [PerplexityRatio("all", 1.02, 1.01, 1.03), PerplexityRatio("code", 1.0, 0.99, 1.01)]
    plot = plots.perplexity_plot(rows)
    assert plot is not None and "above 1 for 1 of 2" in plot.caption
    dots = list(ElementTree.fromstring(plot.svg).iter("circle"))
    assert [dot.get("class") for dot in dots] == ["dot new", "dot new hollow"]
    assert float(dots[0].get("cx", 0)) > float(dots[1].get("cx", 0))
    [one] = [
        line for line in ElementTree.fromstring(plot.svg).iter("line") if line.get("class") == "one"
    ]
    assert float(one.get("x1", 0)) == float(dots[1].get("cx", 0))
    assert plots.perplexity_plot([PerplexityRatio("all", math.nan, 1, 1)]) is None


def test_a_distribution_is_that_of_its_times() -> None:
    """At each drawn corner as many times lie at or below it as it says."""
    old, new = [float(time) for time in range(100, 200)], [float(1000 - 9 * n) for n in range(99)]
    load = LoadFigures(4, [], [], old, new, [], [])
    [plot] = plots.latency_plots([load])
    assert plot.title == "Time to the first token, 4 clients"
    assert "old: 100 measured, median 149.5 ms, largest 199 ms" in plot.caption
    ticks = ticks_of(plot.svg)
    across = (ticks["750"][0] - ticks["500"][0]) / 250
    for of, times in (("old", old), ("new", new)):
        for x, y in points_of(plot.svg, "line", of)[1::2]:
            time = 500 + (x - ticks["500"][0]) / across
            share = (y - ticks["0 %"][1]) / (ticks["100 %"][1] - ticks["0 %"][1])
            below = sum(other <= time + 1 for other in times) / len(times)
            assert abs(share - below) < 0.02


def test_many_times_are_thinned_and_keep_their_median() -> None:
    gaps = [10 + time / 1000 for time in range(20_000)]
    [plot] = plots.latency_plots([LoadFigures(1, [], [], [], [], [], gaps)])
    corners = points_of(plot.svg, "line", "new")
    assert 300 < len(corners) <= 400
    ticks = ticks_of(plot.svg)
    middle = min(corners, key=lambda corner: abs(corner[1] - ticks["50 %"][1]))
    assert abs(middle[0] - ticks["20"][0]) < 2


def test_the_load_curve_goes_through_the_medians() -> None:
    loads = [
        LoadFigures(1, [10, 20, 90], [10], [], [], [], []),
        LoadFigures(16, [100], [50, 70], [], [], [], []),
        LoadFigures(64, [], [], [], [], [], []),
    ]
    plot = plots.load_plot(loads)
    assert plot is not None
    ticks = ticks_of(plot.svg)
    assert {"1", "16", "0", "100"} <= ticks.keys() and "64" not in ticks
    each = (ticks["100"][1] - ticks["0"][1]) / 100
    for of, medians in (("old", [20, 100]), ("new", [10, 60])):
        heights = [y for _, y in points_of(plot.svg, "line", of)]
        assert heights == pytest.approx([ticks["0"][1] + each * rate for rate in medians], abs=0.1)
    assert len(list(ElementTree.fromstring(plot.svg).iter("circle"))) == 3 + 1 + 1 + 2
    assert plots.load_plot(loads[2:]) is None
    assert plots.load_rows(loads)[0].cells[:3] == ["20", "10", "× 0.500"]
    assert plots.load_rows(loads)[2].cells == ["–"] * 9


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, ["0", "25", "50", "75", "100"]),
        (0.98, 1.03, ["0.98", "1.00", "1.02"]),
        (1, 1.1, ["1.000", "1.025", "1.050", "1.075", "1.100"]),
        (12.1, 19.7, ["14", "16", "18"]),
        (0, 4000, ["0", "1,000", "2,000", "3,000", "4,000"]),
        (7, 7, ["6.8", "7.0", "7.2"]),
        (0, 0, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (0, 3e6, ["0", "1e+06", "2e+06", "3e+06"]),
    ],
)
def test_ticks_are_few_and_round(low: float, high: float, ticks: list[str]) -> None:
    axis = linear_axis("ms", low, high)
    assert [text for _, text in axis.ticks] == ticks
    assert all(0 <= axis.share(value) <= 1 for value, _ in axis.ticks)


def test_a_logarithmic_axis_keeps_its_largest_decades() -> None:
    axis = logarithmic_axis("nats", [1e-30, 0.0, 0.2], 6)
    assert (axis.low, axis.high) == pytest.approx((1e-6, 1.0))
    assert [text for _, text in axis.ticks] == ["≤10⁻⁶", "10⁻⁴", "0.01", "1"]
    assert axis.share(1e-3) == pytest.approx(0.5) and axis.share(0.0) == 0.0
    assert len(named_axis("clients", [str(number) for number in range(20)]).ticks) <= 6

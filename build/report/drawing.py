"""One plot as SVG, by the standard library's XML: frame, ticks, lines, dots. Knows no data.

A unit is a CSS pixel where the plot is 360 wide, which is a phone's width: letters stay readable
there, and a wide page sets plots beside each other. Colours are the page's, by class; what is
`old` is dashed and hollow as well, and a page that is shown without its style still has lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from enginehouse.build.report.axes import Axis
from enginehouse.build.report.words import visible

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 24, 38

_LOOKS = {
    "line": {"stroke": "currentColor"},
    "polyline": {"stroke": "currentColor", "fill": "none"},
    "polygon": {"fill": "currentColor", "opacity": "0.25"},
    "circle": {"stroke": "currentColor", "fill": "currentColor"},
    "text": {"font-size": "11"},
}
_DASHED = {"stroke-dasharray": "6 4"}

Point = tuple[float, float]


class Drawing:
    """summary: what a reader is told who sees no plot. height: in units, of the whole.
    left: the margin where the ticks of `y` are written.
    """

    def __init__(
        self, summary: str, x: Axis, y: Axis, *, height: int = 210, left: int = _LEFT
    ) -> None:
        self._x, self._y, self._height, self._left = x, y, height, left
        size = {"viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height)}
        told = {"role": "img", "aria-label": visible(summary)}
        self._svg = ElementTree.Element("svg", {**size, **told})
        bottom, right = height - _BOTTOM, WIDTH - _RIGHT
        for value, text in y.ticks:
            place = self.down(value)
            self._add("line", "grid", x1=left, x2=right, y1=place, y2=place)
            self._text(text, left - 5, place + 4, "end")
        for value, text in x.ticks:
            place = self.across(value)
            self._add("line", "axis", x1=place, x2=place, y1=bottom, y2=bottom + 4)
            self._text(text, place, bottom + 16, "middle")
        self._add("line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
        self._text(y.label, 2, 12, "start")
        self._text(x.label, right, height - 5, "end")

    def across(self, value: float) -> float:
        return self._left + self._x.share(value) * (WIDTH - _RIGHT - self._left)

    def down(self, value: float) -> float:
        bottom = self._height - _BOTTOM
        return bottom - self._y.share(value) * (bottom - _TOP)

    def line(self, points: Iterable[Point], of: str) -> None:
        self._add("polyline", f"line {of}", points=self._placed(points))

    def band(self, lower: Sequence[Point], upper: Sequence[Point], of: str) -> None:
        self._add("polygon", f"band {of}", points=self._placed([*lower, *reversed(upper)]))

    def dots(self, points: Iterable[Point], of: str) -> None:
        for x, y in points:
            self._add("circle", f"dot {of}", cx=self.across(x), cy=self.down(y), r=3)

    def upright(self, value: float, of: str) -> None:
        """A line across the whole plot, at a place of `x`."""
        place, bottom = self.across(value), self._height - _BOTTOM
        self._add("line", of, x1=place, x2=place, y1=_TOP, y2=bottom)

    def word(self, text: str, y: float, *, at_end: bool = False) -> None:
        """At a place of `y`, at the plot's left or right end."""
        x, anchor = (WIDTH - _RIGHT, "end") if at_end else (self._left, "start")
        self._text(text, x, self.down(y), anchor, "word")

    def svg(self) -> str:
        return ElementTree.tostring(self._svg, encoding="unicode")

    def _placed(self, points: Iterable[Point]) -> str:
        return " ".join(f"{_short(self.across(x))},{_short(self.down(y))}" for x, y in points)

    def _text(self, text: str, x: float, y: float, anchor: str, kind: str = "tick") -> None:
        element = self._add("text", kind, x=x, y=y)
        element.set("text-anchor", anchor)
        element.text = visible(text)

    def _add(self, name: str, kind: str, **attributes: float | str) -> ElementTree.Element:
        written = {
            key: value if isinstance(value, str) else _short(value)
            for key, value in attributes.items()
        }
        dashed = _DASHED if kind == "line old" else {}
        looks = {**_LOOKS[name], **dashed}
        return ElementTree.SubElement(self._svg, name, {"class": kind, **looks, **written})


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

"""Amounts as bars beside each other, as SVG: each with its name, and words of what it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from enginehouse.build.report.drawing import WIDTH
from enginehouse.build.report.words import one_line

_ROW, _BAR, _LEFT, _TOP = 38, 12, 2, 4


class Bar(NamedTuple):
    """share: 0 to 1, of the whole width; what is beyond is cut. start: where it begins."""

    name: str
    words: str
    share: float
    start: float = 0.0


def bars(summary: str, rows: Sequence[Bar]) -> str:
    """One row a bar; summary: what a reader is told who sees none."""
    height = _TOP + _ROW * len(rows)
    size = {"viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height)}
    told = "; ".join([one_line(summary, 200), *(f"{row.name} {row.words}" for row in rows)])
    svg = ElementTree.Element("svg", {**size, "role": "img", "aria-label": one_line(told, 1000)})
    room = WIDTH - 2 * _LEFT
    for number, row in enumerate(rows):
        top = _TOP + number * _ROW
        start = min(1.0, max(0.0, row.start))
        width = min(1.0 - start, max(0.0, row.share)) * room
        for text, x, anchor in ((row.name, _LEFT, "start"), (row.words, WIDTH - _LEFT, "end")):
            place = {"x": str(x), "y": str(top + 12), "text-anchor": anchor, "font-size": "11"}
            ElementTree.SubElement(svg, "text", place).text = one_line(text, 60)
        ground = {"x": str(_LEFT), "y": str(top + 17), "width": str(room), "height": str(_BAR)}
        looks = {"class": "ground", "fill": "none", "stroke": "currentColor"}
        ElementTree.SubElement(svg, "rect", {**looks, **ground})
        place = {**ground, "x": f"{_LEFT + start * room:.1f}", "width": f"{width:.1f}"}
        ElementTree.SubElement(svg, "rect", {"class": "bar", "fill": "currentColor", **place})
    return ElementTree.tostring(svg, encoding="unicode")

"""The page as html.parser reads it: whole, one file, no request, and text that stays text."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest

from enginehouse.build.report.words import one_line
from enginehouse.regress.findings import Verdict
from enginehouse.regress.outcome import Outcome, TextDivergence
from enginehouse.regress.report.page import page
from enginehouse.regress.report.wording import MARKS
from makers.outcomes import HOSTILE, empty_outcome, full_outcome, hostile_outcome

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
OUTCOMES = {"empty": empty_outcome(), "full": full_outcome(), "hostile": hostile_outcome()}


@functools.cache
def page_of(name: str) -> str:
    return page(OUTCOMES[name])


class Reader(HTMLParser):
    """What stands in the page: its tags, their attributes, its text; refuses what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_page_asks_for_nothing(name: str) -> None:
    reader = Reader(page_of(name))
    assert not LOADING & set(reader.tags)
    for tag, attribute, value in reader.attributes:
        assert attribute not in ("src", "srcset", "href", "xlink:href", "style", "action"), tag
        assert not attribute.startswith("on"), (tag, attribute)
        assert "url(" not in value
    [style] = re.findall(r"<style>(.*?)</style>", page_of(name), re.S)
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "default-src 'none'" in page_of(name), "and a browser would refuse it"


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_plot_is_well_formed_and_says_what_it_shows(name: str) -> None:
    plots = [
        ElementTree.fromstring(found)
        for found in re.findall(r"<svg .*?</svg>", page_of(name), re.S)
        if "aria-hidden" not in found[:120]
    ]
    assert (
        len(plots) == {"empty": 0, "full": 9 + 3 + 1 + 1 + 6, "hostile": 15 + 3 + 1 + 1 + 6}[name]
    )
    for plot in plots:
        assert plot.get("role") == "img" and len(plot.get("aria-label", "")) > 40
        _, _, width, height = map(float, plot.get("viewBox", "").split())
        for element in plot.iter():
            for axis, most in (("x", width), ("y", height)):
                for key in (axis, f"{axis}1", f"{axis}2", f"c{axis}"):
                    assert 0 <= float(element.get(key, 0)) <= most
            for point in element.get("points", "").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width and 0 <= y <= height


def test_the_page_says_the_verdict_then_what_differs_then_what_is_not_well() -> None:
    outcome, text = OUTCOMES["full"], "".join(Reader(page_of("full")).texts)
    parts = ["Regressed", *outcome.explained, "What regressed", "Divergence", "All checks"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    for finding in outcome.findings:
        assert finding.sentence in text, finding.check
        assert MARKS[finding.status].word in text
    for subject in (outcome.new, outcome.old):
        assert subject is not None
        assert all(value in text for value in (subject.target, *subject.facts.values()))


@pytest.mark.parametrize("verdict", Verdict)
def test_each_verdict_has_a_sign_and_a_word(verdict: Verdict) -> None:
    text = "".join(Reader(page(full_outcome(verdict=verdict, texts=1))).texts)
    heading = re.sub(r"\s+", " ", text[text.index("\n", text.index(":")) :]).strip()
    sign = {"passed": "✓", "regressed": "✗", "cannot tell": "?"}[verdict.value]
    assert heading.startswith(f"{sign} {verdict.value.capitalize()} ")


def test_hostile_text_is_text() -> None:
    texts = " ".join(" ".join(Reader(page_of("hostile")).texts).split())
    for text in HOSTILE:
        assert one_line(text, 1000) in texts
    assert not set(page_of("hostile")) & {chr(code) for code in (*range(9), *range(11, 32), 127)}
    page_of("hostile").encode("utf-8")


def test_every_table_scrolls_inside_itself() -> None:
    text = page_of("full")
    assert text.count("<table") == text.count('class="scroll"') == 4 + 2


def test_an_empty_outcome_shows_no_empty_part() -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page_of("empty"))
    assert headings == ["What differs between the builds", "Engines and machines"]


def test_what_does_not_diverge_is_a_sentence() -> None:
    same = [TextDivergence(name, [0.0] * 9) for name in ("mill", "letter")]
    text = page(msgspec.structs.replace(empty_outcome(), divergence=same))
    assert "No divergence at any position of 2 texts (tokens): mill (9), letter (9)." in text
    assert "<svg" not in text


def test_long_curves_make_no_long_page() -> None:
    curve = [1e-3 + position % 7 * 1e-4 for position in range(4000)]
    many = [TextDivergence(f"text {number}", curve) for number in range(30)]
    outcome: Outcome = msgspec.structs.replace(full_outcome(), divergence=many)
    text = page(outcome)
    assert len(text.encode()) < 700_000
    assert "24 more texts" in text

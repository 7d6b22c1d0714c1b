"""A comment as markdown-it reads it: bounded, and its text is the outcome's text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from enginehouse.build.report.words import one_line
from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.markdown import MARKER, MOST_CHARACTERS, escaped, markdown
from makers.outcomes import HOSTILE, empty_outcome, full_outcome, hostile_outcome

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OURS = {MARKER, "<details>", "</details>"}


def tokens(text: str) -> Iterator[Token]:
    for token in READER.parse(text):
        yield token
        yield from token.children or ()


def rows(text: str) -> list[list[str]]:
    """The cells of every table's body, as a reader sees them."""
    found: list[list[str]] = []
    read = READER.parse(text)
    for token, after in zip(read, read[1:], strict=False):
        if token.type == "tr_open":
            found.append([])
        if token.type in ("td_open", "th_open"):
            found[-1].append("".join(child.content for child in after.children or ()))
    return found


def seen(text: str) -> str:
    """What the reader makes of one paragraph of plain text, without what parts mentions."""
    paragraph = READER.parse(text)[1]
    assert {child.type for child in paragraph.children or ()} <= {"text", "text_special"}
    return "".join(child.content for child in paragraph.children or ()).replace("\u200b", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_an_escaped_text_renders_as_itself(text: str) -> None:
    assert seen(escaped(text)) == one_line(text, 500)


@pytest.mark.parametrize("text", ["@everyone", "#1", "!2", "%3", "~bug", "$4", "&5", "a@b.c"])
def test_a_mention_or_a_reference_is_parted(text: str) -> None:
    assert re.search(r"[@#!%~$&;]\u200b\w", escaped(text).replace("amp;", ""))


def test_the_verdict_is_first_then_what_differs_then_what_is_not_well() -> None:
    outcome = full_outcome()
    text = markdown(outcome)
    assert text.startswith(f"{MARKER}\n## ✗ Engine regression: regressed\n")
    places = [text.index(part) for part in (*outcome.explained, "| ✗ regressed", "<details>")]
    assert places == sorted(places)
    folded = text[text.index("<details>") :]
    assert "regressed |" not in folded and "cannot tell |" not in folded
    found = {row[2] for row in rows(text)}
    assert {finding.sentence for finding in outcome.findings} <= found


@pytest.mark.parametrize(
    "outcome",
    [empty_outcome(), full_outcome(), hostile_outcome()],
    ids=["empty", "full", "hostile"],
)
def test_nothing_breaks_out_of_its_cell(outcome: Outcome) -> None:
    text = markdown(outcome)
    for token in tokens(text):
        if token.type in ("html_block", "html_inline"):
            assert all(
                line in OURS or re.fullmatch(r"<summary>[\w, ]+</summary>", line)
                for line in token.content.split("\n")
                if line
            ), token.content
        assert token.type not in ("image", "link_open", "fence", "code_block", "hr")
        if token.type == "code_inline":
            assert token.content in ("report.html", "report.json")
    assert {len(row) for row in rows(text)} <= {3}


def test_a_long_outcome_keeps_below_the_limit_and_says_what_is_left_out() -> None:
    findings = [
        Finding("numerics", f"check {number}", status, "🦙| " * 300, {"a": 1.0})
        for number in range(300)
        for status in (Status.PASSED, Status.CANNOT_TELL, Status.REGRESSED)
    ]
    facts = {f"fact {number}": "`|`" * 300 for number in range(500)}
    outcome = full_outcome()
    outcome = msgspec.structs.replace(
        outcome,
        explained=["é<|" * 500] * 400,
        findings=findings,
        new=msgspec.structs.replace(outcome.new, facts=facts, target="/".join(["🦙"] * 9000)),
    )
    text = markdown(outcome)
    assert 40_000 < len(text.encode()) < MOST_CHARACTERS
    read = rows(text)
    assert {len(row) for row in read} == {3}
    shown = sum(row[0] == "✗ regressed" for row in read)
    [more] = re.findall(r"^\| … \| \| (\d+) more", text[: text.index("<details>")], re.M)
    assert 0 < shown < 300 and shown + int(more) == 600, "what concerns most is shown first"
    left_out = len(re.findall(r"^(?:- |\| … \| (?:\| )?)\d+ more: `report.html` ", text, re.M))
    assert left_out == 4, "differences, what is not well, the others, the engines"

"""A comment on a pull request: the verdict, what differs, what regressed; the rest is folded.

Of GitHub's and GitLab's Markdown what both read. No text from outside is taken as
Markdown or HTML, or mentions anybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from enginehouse.build.report.words import one_line
from enginehouse.regress.findings import Finding
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.wording import (
    CONCERNS,
    MARKS,
    by_concern,
    compared,
    count_words,
    differences,
    facts,
    headline,
    mark_of,
)

# By this the comment of an earlier run is found, to be written anew.
MARKER = "<!-- enginehouse regress -->"
MOST_CHARACTERS = 65_536  # GitHub's limit on a comment
# What each part may take, in bytes of UTF-8, of which a character has at least one: 56,000 in all.
_DIFFERS, _CONCERNS, _OTHERS, _SUBJECTS = 10_000, 22_000, 16_000, 8_000
_SENTENCE, _NAME = 500, 80
_WHOLE = "`report.html` and `report.json` have the whole."


def markdown(outcome: Outcome) -> str:
    """Below MOST_CHARACTERS, whatever the outcome."""
    mark = mark_of(outcome.verdict)
    concerns = [finding for finding in outcome.findings if finding.status in CONCERNS]
    others = [finding for finding in outcome.findings if finding.status not in CONCERNS]
    lines = [
        MARKER,
        f"## {mark.sign} Engine regression: {mark.word}",
        "",
        escaped(f"{headline(outcome)} Judged: {compared(outcome)}."),
        "",
        "**What differs between the builds**",
        "",
        *_within(_DIFFERS, [f"- {escaped(text)}" for text in differences(outcome)], "- "),
    ]
    if concerns:
        lines += ["", *_table(concerns, _CONCERNS)]
    if others:
        lines += ["", *_folded(count_words(others), _table(others, _OTHERS))]
    lines += ["", *_folded("engines and machines", _subjects(outcome))]
    return "\n".join(lines) + "\n"


def escaped(text: str, most: int = _SENTENCE) -> str:
    """One line that renders as the text itself, in a table too. most: of its characters.

    A zero-width space parts what would become a mention or a reference (@name, #1, GitLab's !1, %1,
    ~name, $1 and &1). A URL becomes a link that says where it leads.
    """
    line = re.sub(r"([@#!%~$&])(?=\w)", "\\1\u200b", one_line(text, most))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]#!|~$])", r"\\\1", line)
    return re.sub(r"^([-+=]|\d+[.)](?= |$))", _unlisted, line)


def _unlisted(start: re.Match[str]) -> str:
    """What begins a list or underlines a heading, as text."""
    return f"{start[0][:-1]}\\{start[0][-1]}"


def _table(findings: Iterable[Finding], most: int) -> list[str]:
    rows = [
        f"| {MARKS[finding.status].sign} {MARKS[finding.status].word} "
        f"| {escaped(f'{finding.group}: {finding.check}', _NAME)} | {escaped(finding.sentence)} |"
        for finding in by_concern(findings)
    ]
    return ["| | check | found |", "| --- | --- | --- |", *_within(most, rows, "| … | | ", " |")]


def _subjects(outcome: Outcome) -> list[str]:
    rows = [
        f"| {escaped(name, _NAME)} | {escaped(new, 200)} | {escaped(old, 200)} |"
        for name, new, old in facts(outcome)
    ]
    heading = ["| | new | baseline |", "| --- | --- | --- |"]
    return [*heading, *_within(_SUBJECTS, rows, "| … | ", " | |")]


def _within(most: int, lines: list[str], before: str, after: str = "") -> list[str]:
    """The first lines that fit into so many bytes; then how many more there are."""
    spent = 0
    for number, line in enumerate(lines):
        spent += len(line.encode()) + 1
        if spent > most:
            return [*lines[:number], f"{before}{len(lines) - number} more: {_WHOLE}{after}"]
    return lines


def _folded(summary: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]

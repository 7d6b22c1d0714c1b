"""An outcome in a terminal or a CI log of 80 columns: what differs, findings, the verdict last."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from enginehouse.build.report.words import one_line
from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.wording import (
    MARKS,
    Mark,
    compared,
    count_words,
    differences,
    grouped,
    headline,
    mark_of,
)

_STYLES = {
    Status.REGRESSED: "bold red",
    Status.CANNOT_TELL: "yellow",
    Status.NOT_JUDGED: "dim",
    Status.PASSED: "green",
}
_MOST_SENTENCE = 1200  # characters: some fifteen lines
_WORDS = max(len(mark.word) for mark in MARKS.values())


def print_outcome(outcome: Outcome, console: Console) -> None:
    """A check that passed takes one line, cut at the console's width; what it found in full is in
    the reports. Nothing that a terminal obeys is printed, nor a sign that it has not.
    """
    _print(console, Text(compared(outcome)))
    _print(console, Text("What differs between the builds", style="bold"))
    for sentence in differences(outcome):
        _print(console, Text(one_line(sentence, _MOST_SENTENCE)), indent=2)
    for group, findings in grouped(outcome.findings):
        heading = Text(one_line(group, 40), style="bold").append(f": {count_words(findings)}")
        _print(console, Text(), heading)
        for finding in findings:
            _print_finding(console, finding)
    mark = mark_of(outcome.verdict)
    style = next(style for status, style in _STYLES.items() if MARKS[status] is mark)
    verdict = Text(f"{_sign(mark, console)} {mark.word.upper()}", style=style)
    _print(console, Text(), verdict.append(f"  {headline(outcome)}", style="not bold default"))


def _print_finding(console: Console, finding: Finding) -> None:
    mark = MARKS[finding.status]
    line = Text(f"  {_sign(mark, console)} {mark.word:<{_WORDS}}", style=_STYLES[finding.status])
    line.append(f"  {one_line(finding.check, 60)}", style="default")
    sentence = one_line(finding.sentence, _MOST_SENTENCE)
    if finding.status is Status.PASSED:
        line.append(f"  {sentence}", style="dim default")
        line.truncate(console.width, overflow="ellipsis")
        _print(console, line)
    else:
        _print(console, line)
        _print(console, Text(sentence), indent=6)


def _sign(mark: Mark, console: Console) -> str:
    return mark.plain if console.options.ascii_only else mark.sign


def _print(console: Console, *texts: Text, indent: int = 0) -> None:
    for text in texts:
        text.plain = text.plain.encode(console.encoding, "replace").decode(console.encoding)
        for line in text.wrap(console, console.width - indent):
            line.rstrip()
            console.print(Text(" " * indent).append_text(line), soft_wrap=True)

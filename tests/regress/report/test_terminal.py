"""What a CI log of 80 columns shows, and what never reaches a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.terminal import print_outcome
from makers.outcomes import empty_outcome, full_outcome, hostile_outcome


def printed(outcome: Outcome, *, encoding: str = "utf-8", terminal: bool = False) -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    console = Console(
        file=file, width=80, force_terminal=terminal, color_system="standard" if terminal else None
    )
    print_outcome(outcome, console)
    file.flush()
    return written.getvalue().decode(encoding)


def test_what_differs_is_first_and_the_verdict_last() -> None:
    outcome = full_outcome()
    lines = printed(outcome).splitlines()
    assert max(map(len, lines)) <= 80 and not any(line.endswith(" ") for line in lines)
    assert lines[2] == "What differs between the builds"
    assert lines[3] == f"  {outcome.explained[0]}"
    counts = "2 regressed, 1 cannot tell, 1 not judged, 6 passed"
    assert " ".join(lines[-2:]) == f"✗ REGRESSED  Of 10 checks: {counts}; in 3 min 7 s."
    headings = [line.split(":")[0] for line in lines if re.match(r"\w+: \d", line)]
    assert headings == ["numerics", "behaviour", "speed", "quality"]
    text = " ".join(" ".join(lines).split())
    for finding in outcome.findings:
        word = {"passed": "✓ passed", "regressed": "✗ regressed"}.get(finding.status.value)
        word = (
            word or {"cannot_tell": "? cannot tell", "not_judged": "– not judged"}[finding.status]
        )
        shown = finding.sentence if word != "✓ passed" else finding.sentence[:20]
        assert f"{word} {finding.check} {shown}" in text


def test_colour_adds_nothing_but_colour() -> None:
    coloured = printed(full_outcome(), terminal=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == printed(full_outcome())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("make", [empty_outcome, full_outcome, hostile_outcome])
def test_nothing_reaches_the_terminal_but_letters(
    encoding: str, make: Callable[[], Outcome]
) -> None:
    text = printed(make(), encoding=encoding)
    assert not set(text) & {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160))}
    assert "\u202e" not in text
    if encoding == "ascii" and make is full_outcome:
        assert "x regressed" in text and "+ passed" in text
    if make is hostile_outcome:
        assert "[bold red]markup[/bold red] :smile:" in text

"""What all reports say alike: signs, words, their order, a figure's digits. Knows no format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from enginehouse.build.report.words import duration, one_line, visible
from enginehouse.regress.findings import Figure, Finding, Status, Verdict
from enginehouse.regress.outcome import Described, Outcome

GROUPS = ("numerics", "behaviour", "speed", "quality")


class Mark(NamedTuple):
    """Of a status, by sign and by word: a colour never stands alone. plain: the sign in ASCII."""

    sign: str
    plain: str
    word: str


# In the order in which they concern a reader.
MARKS = {
    Status.REGRESSED: Mark("✗", "x", "regressed"),
    Status.CANNOT_TELL: Mark("?", "?", "cannot tell"),
    Status.NOT_JUDGED: Mark("–", "-", "not judged"),
    Status.PASSED: Mark("✓", "+", "passed"),
}
CONCERNS = (Status.REGRESSED, Status.CANNOT_TELL)
_STATUS_OF = {
    Verdict.REGRESSED: Status.REGRESSED,
    Verdict.CANNOT_TELL: Status.CANNOT_TELL,
    Verdict.PASSED: Status.PASSED,
}


def mark_of(verdict: Verdict) -> Mark:
    return MARKS[_STATUS_OF[verdict]]


def figure(value: Figure) -> str:
    """A number as a person reads it, with four digits that count; text as it is."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return one_line(value, 200)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def grouped(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    """By group, what concerns most first; groups unknown here come last, by name."""
    groups: dict[str, list[Finding]] = {}
    for status in MARKS:
        for finding in findings:
            if finding.status is status:
                groups.setdefault(finding.group, []).append(finding)
    names = [*GROUPS, *sorted(groups.keys() - set(GROUPS))]
    return [(name, groups[name]) for name in names if name in groups]


def by_concern(findings: Iterable[Finding]) -> list[Finding]:
    """What concerns most first, then by group."""
    found = [finding for _, members in grouped(findings) for finding in members]
    return sorted(found, key=lambda finding: list(MARKS).index(finding.status))


def count_words(findings: Iterable[Finding]) -> str:
    """`2 regressed, 1 cannot tell, 38 passed`; a status that none has is left out."""
    statuses = [finding.status for finding in findings]
    counts = [(statuses.count(status), mark.word) for status, mark in MARKS.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "no checks"


def headline(outcome: Outcome) -> str:
    """What stands behind the verdict, in one sentence."""
    number = len(outcome.findings)
    checks = f"{number} check{'' if number == 1 else 's'}"
    if number == 0:
        return f"No check was run, in {duration(outcome.seconds)}."
    return f"Of {checks}: {count_words(outcome.findings)}; in {duration(outcome.seconds)}."


def compared(outcome: Outcome) -> str:
    """Who was judged, against whom."""
    against = [f"against {called(outcome.old)}"] if outcome.old else ["without a baseline"]
    if outcome.reference:
        against.append(f"and the checkpoint {one_line(outcome.reference, 120)}")
    return " ".join([called(outcome.new), *against])


def called(subject: Described) -> str:
    recorded = "the recording " if subject.kind == "recording" else ""
    return recorded + one_line(subject.target, 120)


def facts(outcome: Outcome) -> list[tuple[str, str, str]]:
    """What is known of both engines: name, of the new, of the old; – where nothing is."""

    def known(subject: Described | None) -> dict[str, str]:
        if subject is None:
            return {}
        digest = {} if subject.digest is None else {"digest": subject.digest}
        told = {"target": subject.target, "kind": subject.kind, **digest, **subject.facts}
        return {visible(name): visible(value) for name, value in told.items()}

    new, old = known(outcome.new), known(outcome.old)
    return [(name, new.get(name, "–"), old.get(name, "–")) for name in {**new, **old}]


def differences(outcome: Outcome) -> list[str]:
    """What differs between the builds, in sentences: at least one."""
    if outcome.explained:
        return [visible(sentence) for sentence in outcome.explained]
    return [
        "Nothing is known to differ." if outcome.old else "There is no baseline to differ from."
    ]


def moment(outcome: Outcome) -> str:
    """`2026-01-31 12:34 UTC`"""
    return f"{one_line(outcome.created, 100)[:16].replace('T', ' ')} UTC"

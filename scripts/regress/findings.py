"""What a check found, and what all of them come to. Knows no check."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import msgspec

Figure = float | int | str | None


class Status(str, Enum):
    """Of a finding. not_judged: it could not be, or is only told; the sentence says why."""

    PASSED = "passed"
    REGRESSED = "regressed"
    CANNOT_TELL = "cannot_tell"
    NOT_JUDGED = "not_judged"


class Finding(msgspec.Struct, frozen=True):
    """One check's result. group: numerics | behaviour | speed | quality. sentence: what was found
    and what was wanted, with units. figures: the numbers it rests on, limits too.
    """

    group: str
    check: str
    status: Status
    sentence: str
    figures: dict[str, Figure] = {}


class Verdict(str, Enum):
    """Of a run."""

    PASSED = "passed"
    REGRESSED = "regressed"
    CANNOT_TELL = "cannot tell"

    def exit_status(self, *, cannot_tell: str | None = None) -> int:
        """0 passed, 1 regressed, 3 cannot tell, unless that counts as `pass` or `fail`."""
        if self is Verdict.CANNOT_TELL:
            return {None: 3, "pass": 0, "fail": 1}[cannot_tell]
        return 0 if self is Verdict.PASSED else 1


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """One regression makes it; else one that cannot be told, or that nothing was judged."""
    found = {finding.status for finding in findings}
    if Status.REGRESSED in found:
        return Verdict.REGRESSED
    if Status.CANNOT_TELL in found or Status.PASSED not in found:
        return Verdict.CANNOT_TELL
    return Verdict.PASSED

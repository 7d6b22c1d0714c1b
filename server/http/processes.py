"""Which process it is that works on something, in words that outlive it, and whether it still runs.

A number alone is not enough: after a restart another process may have it. Knows no HTTP.
Source: proc(5), /proc/PID/stat; /proc/sys/kernel/random/boot_id.
"""

from __future__ import annotations

import os
from pathlib import Path

_START_FIELD = 22 - 3  # of /proc/PID/stat, behind the name


def own_mark() -> str:
    """Of this process: its number, when it began, and in which run of the machine."""
    return _mark(os.getpid()) or str(os.getpid())


def runs(mark: str) -> bool:
    """Whether that very process is there; one that is dead and not yet waited for is not."""
    number = mark.partition(" ")[0]
    return number.isdecimal() and _mark(int(number)) == mark


def _mark(number: int) -> str | None:
    """None where it does not run."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{number} {fields[_START_FIELD - 1]} {boot}"

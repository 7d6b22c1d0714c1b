"""What this computer's CPU has to give: threads to compute with, and free memory."""

from __future__ import annotations

import os

import psutil


def default_threads() -> int:
    """As many as OMP_NUM_THREADS says, else one for each core that this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked):
        return int(asked)
    allowed = len(psutil.Process().cpu_affinity() or ()) if psutil.LINUX else psutil.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or allowed or 1)


def free_memory() -> int:
    """Bytes that can still be taken."""
    return psutil.virtual_memory().available

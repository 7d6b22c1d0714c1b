"""What a machine is, in a person's words: figures of two that differ are not compared. Knows no
engine.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil


def describe_machine() -> dict[str, str]:
    """CPU, cores, memory, system; GPUs where there are any."""
    from enginehouse.runtime.machine.gpus import visible_gpus

    gpus = visible_gpus()
    found = {
        "cpu": _cpu_name(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {**found, **({"gpus": ", ".join(str(gpu) for gpu in gpus)} if gpus else {})}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"

"""Kills the processes of a TensorRT-LLM host that ended without killing them itself.

Run by path with nothing installed: reads `pid start_time` lines and, when its input ends, sends
SIGKILL to each of those that still is the process it was. Linux; start_time is field 22 of
/proc/pid/stat.
"""

from __future__ import annotations

import os
import signal
import sys


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # outlives the host by design
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    known = {tuple(line.split()) for line in sys.stdin}
    for pid, started in known:
        if start_time(int(pid)) == started:
            os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main()

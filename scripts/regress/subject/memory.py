"""How much memory a server takes, all its processes. Knows no engine."""

from __future__ import annotations

import psutil


def memory_of(pid: int) -> int | None:
    """Bytes that a process and its children hold: what each has to itself, and its part of what is
    shared (PSS). None where the system does not tell.
    """
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
        except (psutil.Error, AttributeError):  # another's, or no Linux
            return None
    return total

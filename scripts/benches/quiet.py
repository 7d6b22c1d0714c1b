"""How busy the machine is by others: who is neither this process nor what it measures.

Linux only: reads /proc. What a hypervisor takes away counts as others'. Knows nothing of what is
measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from types import TracebackType

import psutil

LIMIT = 0.05  # of all cores: beyond it a figure is not called quiet
_PROBE_S = 0.3
_TICKS = os.sysconf("SC_CLK_TCK")


def busy_s(line: str) -> float:
    """CPU seconds that were not idle, of the first line of /proc/stat."""
    user, nice, system, _idle, _waiting, *interrupts = map(int, line.split()[1:9])
    return (user + nice + system + sum(interrupts)) / _TICKS


def others_share(busy: float, own: float, wall: float, cores: int) -> float:
    """Of all cores, 0 to 1; seconds, of which ticks are rounded."""
    return min(1.0, max(0.0, busy - own) / (wall * cores))


class Others:
    """Measures from the block's beginning to its end, which is `wall_s` long: `share` is others'
    part of all cores. measured: processes that, with their descendants, are none of the others;
    None for all that descend from this one.
    """

    share = wall_s = 0.0

    def __init__(self, measured: Iterable[int] | None = None) -> None:
        self._measured = None if measured is None else tuple(measured)

    def __enter__(self) -> Others:
        self._began = time.perf_counter(), _machine_s(), own_s(self._measured)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        began, busy, own = self._began
        self.wall_s = time.perf_counter() - began
        cores = os.cpu_count() or 1
        own = own_s(self._measured) - own
        self.share = others_share(_machine_s() - busy, own, self.wall_s, cores)


class Patience:
    """Seconds that may be spent on others, in all: on waiting, and on measuring again."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self) -> None:
        """Until a moment is quiet, or nothing is left."""
        while self.left > 0:
            with Others() as others:
                time.sleep(_PROBE_S)
            if others.share <= LIMIT:
                return
            self.left -= _PROBE_S


def _machine_s() -> float:
    with open("/proc/stat") as file:
        return busy_s(file.readline())


def own_s(measured: Iterable[int] | None) -> float:
    """CPU seconds of this process and those measured, with their descendants, those too that have
    ended and were waited for.
    """
    this = psutil.Process()
    if measured is None:
        return _used_s(_tree(this.pid), 4)
    return _used_s([this], 2) + sum(_used_s(_tree(pid), 4) for pid in measured)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []  # it has ended, which whoever asks it will say


def _used_s(processes: Iterable[psutil.Process], fields: int) -> float:
    """fields: 2 for their own time in user and system, 4 with that of children that have ended."""
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:fields])
        except psutil.Error:
            continue  # ended: its parent has waited for it, or will
    return total

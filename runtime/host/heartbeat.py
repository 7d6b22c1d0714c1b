"""That an engine moves, told to the host's parent: a byte a second on the pipe of its readiness.

A host that stands still, in a step or as a whole, sends none: its parent ends it. Knows no engine.
"""

from __future__ import annotations

import os

BEAT_S = 1.0


class Heartbeat:
    """fd: the pipe's end; None where nobody listens."""

    def __init__(self, fd: int | None, now_s: float) -> None:
        self._fd = fd
        self._next_s = now_s
        self._progress: object = None
        if fd is not None:
            os.set_blocking(fd, False)

    def beat(self, now_s: float, is_running: bool, progress: object) -> None:
        """Of a loop that came round: as long as nothing runs, or `progress` is another one."""
        if self._fd is None or now_s < self._next_s:
            return
        moves = not is_running or progress != self._progress
        self._progress = progress
        if moves:
            self._next_s = now_s + BEAT_S
            try:
                os.write(self._fd, b"\n")
            except BlockingIOError:
                pass  # it is full: whoever should read stands still
            except OSError:
                self._fd = None  # nobody listens any more

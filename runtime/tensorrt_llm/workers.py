"""The processes TensorRT-LLM starts for its ranks: what they said last, and their certain end.

MPI's workers are children of MPI's own daemon, in sessions of their own: a signal to the host's
process group does not reach them. Knows nothing of TensorRT-LLM itself.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt_llm import worker_guard

log = logging.getLogger("enginehouse.trtllm")

_WATCH_S = 0.5
_TERMINATE_S = 5.0
_STUCK_S = 20.0  # for a start-up that no exception can reach
_RANK = re.compile(r"\[?rank[ :=]*(\d+)\]?", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class WorkerGuard:
    """Knows the descendants that a start-up makes, until it is settled, and ends them.

    A guard process of its own learns each of them, so that they end even when this process is
    killed and can do nothing any more.
    """

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._before = set(self._own.children(recursive=True))
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(worker_guard.__file__))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.workers: set[psutil.Process] = set()
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="worker-guard", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._settled.wait(_WATCH_S):
            self._look()

    def settle(self) -> None:
        """The start is over: those alive now are the workers, and must stay so."""
        if not self._settled.is_set():
            self._look()
            self._settled.set()
            self._thread.join()
            self.workers = {process for process in self.workers if _lives(process)}

    def _look(self) -> None:
        """Learn the descendants there are now, and tell the guard process of the new ones."""
        with self._lock:
            found = set(self._own.children(recursive=True)) - self._before
            new = {process for process in found if process.pid != self._guard.pid} - self.workers
            self.workers |= new
            assert self._guard.stdin is not None, "it was opened as a pipe"
            for process in new:
                started = worker_guard.start_time(process.pid)
                if started is not None:
                    self._guard.stdin.write(f"{process.pid} {started}\n".encode())
            if new:
                self._guard.stdin.flush()

    def dead(self) -> list[int]:
        """The workers that have ended, by process id."""
        return [process.pid for process in self.workers if not _lives(process)]

    def end(self) -> None:
        """Terminate, then kill, every worker and its process group; returns when they are gone."""
        self.settle()
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = [process for process in self.workers if _lives(process)]
            for process in alive:
                _signal_group(process.pid, number)
            psutil.wait_procs(alive, timeout=_TERMINATE_S)

    def close(self) -> None:
        """End the workers, then the guard, which has nothing left to do."""
        self.end()
        assert self._guard.stdin is not None, "it was opened as a pipe"
        self._guard.stdin.close()
        self._guard.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal_group(pid: int, number: signal.Signals) -> None:
    """To the worker's group where that is not ours too, else to the worker alone."""
    try:
        group = os.getpgid(pid)
        if group == os.getpgrp():
            os.kill(pid, number)
        else:
            os.killpg(group, number)
    except ProcessLookupError:
        pass


class RankLog:
    """Passes on what this process and its workers print, and remembers each rank's last line."""

    def __init__(self) -> None:
        self.last_lines: dict[str, str] = {}
        reader, writer = os.pipe()
        self._saved = os.dup(1), os.dup(2)
        self._out = os.dup(2)
        sys.stdout.flush()
        sys.stderr.flush()
        for fd in (1, 2):
            os.dup2(writer, fd)
        os.close(writer)
        self._thread = threading.Thread(
            target=self._copy, args=(reader,), name="rank-log", daemon=True
        )
        self._thread.start()

    def _copy(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as pipe, os.fdopen(self._out, "wb", 0) as out:
            for line in pipe:
                out.write(line)
                self.remember(line.decode(errors="replace"))

    def remember(self, line: str) -> None:
        text = _ANSI.sub("", line).strip()
        if text:
            rank = _RANK.search(text)
            self.last_lines[f"rank {rank[1]}" if rank else "a rank"] = text

    def report(self) -> str:
        """Each rank's last line, or that there is none."""
        if not self.last_lines:
            return "no rank has said anything"
        lines = (f"{rank} said last: {line!r}" for rank, line in sorted(self.last_lines.items()))
        return "; ".join(lines)

    def close(self) -> None:
        """Give the file descriptors back. The workers must have ended."""
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, fd)
            os.close(saved)
        self._thread.join(_TERMINATE_S)


@contextmanager
def start_deadline(limit_s: float, ranks: RankLog, guard: WorkerGuard) -> Iterator[None]:
    """Raise EngineError in the body after limit_s, with each rank's last line.

    Where the body hangs in a library's C code no exception arrives: then the workers are killed
    and the process ends with status 2. Wants the main thread.
    """

    def sentence() -> str:
        return (
            f"TensorRT-LLM did not start within {limit_s:.0f} s; {ranks.report()}; on PCIe cards "
            "try NCCL_P2P_DISABLE=1, else see whether `enginehouse-build doctor` finds a fault"
        )

    def expire(number: int, frame: FrameType | None) -> None:
        raise EngineError(sentence())

    def stuck() -> None:
        log.error("%s", sentence())
        guard.end()
        os._exit(2)

    previous = signal.signal(signal.SIGALRM, expire)
    timer = threading.Timer(limit_s + _STUCK_S, stuck)
    timer.daemon = True
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        timer.cancel()

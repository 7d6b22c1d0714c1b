"""The ranks beside the leader, told what to do through a pipe each, and watched.

Those of this machine are processes that are started afresh, never forked, as CUDA does not survive
a fork; those of others come by themselves (`remote_ranks.py`). A rank that ends ends the engine:
the others would wait for it for ever. Knows no command's meaning.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from enginehouse.runtime.errors import EngineError

_END_S = 30.0
Come = Callable[[Collection[int]], Mapping[int, Connection]]


def spawn_rank(
    engine_dir: Path, rank: int, max_seq_len: int
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """A rank's process, and the leader's end of its pipe."""
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "enginehouse.runtime.tensorrt.rank", str(engine_dir)]
    command += ["--rank", str(rank), "--max-seq-len", str(max_seq_len)]
    try:
        process = subprocess.Popen(
            [*command, "--pipe", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    finally:
        theirs.close()
    return ours, process


def _hang_up(pipe: Connection) -> None:
    """Close it, and say so: a thread that reads from it would keep it open on the other side."""
    if pipe.closed:
        return
    with socket.socket(fileno=os.dup(pipe.fileno())) as peer, suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)
    pipe.close()


class Followers:
    """Ranks 1 to n - 1. on_death is called, on a thread of its own, when one ends unasked.

    num_local: of all ranks those of this machine, None: all. come: waits for the others' pipes.
    """

    def __init__(
        self,
        engine_dir: Path,
        num_ranks: int,
        max_seq_len: int,
        on_death: Callable[[], None],
        num_local: int | None = None,
        come: Come | None = None,
    ) -> None:
        self._num_local = num_ranks if num_local is None else min(num_local, num_ranks)
        self._num_ranks = num_ranks
        self._on_death = on_death
        self._closing = False
        self._failure: str | None = None
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, self._num_local):
            pipe, process = spawn_rank(engine_dir, rank, max_seq_len)
            self._pipes.append(pipe)
            self._processes.append(process)
            watch = threading.Thread(target=self._watch, args=(rank, process), daemon=True)
            watch.start()
        if come is not None and self._num_local < num_ranks:
            try:
                found = come(range(self._num_local, num_ranks))
            except BaseException:
                self.close()
                raise
            self._pipes += [found[rank] for rank in sorted(found)]

    def watch_remote(self) -> None:
        """From when on ranks say nothing more: whatever comes is the end of one's connection."""
        for rank, pipe in enumerate(self._pipes[self._num_local - 1 :], start=self._num_local):
            threading.Thread(target=self._watch_pipe, args=(rank, pipe), daemon=True).start()

    def _watch_pipe(self, rank: int, pipe: Connection) -> None:
        with suppress(EOFError, OSError):
            pipe.recv_bytes()
        if not self._closing:
            self._failure = self._failure or self._sentence(rank, "its connection is lost")
            self._on_death()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closing:
            self._failure = self._failure or self._sentence(rank, f"exit status {status}")
            self._on_death()

    def _sentence(self, rank: int, how: str) -> str:
        return (
            f"rank {rank} of {self._num_ranks} ended ({how}), without which the engine cannot go "
            "on; its own words are in the log above: start it again"
        )

    @property
    def lost(self) -> bool:
        """Whether a rank has ended."""
        return self._failure is not None

    def check(self) -> None:
        """EngineError when a rank has ended."""
        if self._failure is not None:
            raise EngineError(self._failure)

    def answers(self) -> list[dict[str, Any]]:
        """What each rank says next. EngineError when one fails instead."""
        found = []
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                answer = json.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                self.check()
                raise EngineError(self._sentence(rank, "its pipe is closed")) from None
            if "error" in answer:
                raise EngineError(f"rank {rank} of {self._num_ranks}: {answer['error']}")
            found.append(answer)
        return found

    def tell(self, data: bytes) -> None:
        """Give every rank a command. EngineError when one has ended."""
        self.check()
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                pipe.send_bytes(data)
            except OSError:
                self.check()
                raise EngineError(self._sentence(rank, "its pipe is closed")) from None

    def close(self) -> None:
        """End the ranks: they stop when their pipes do, or are killed."""
        self._closing = True
        for pipe in self._pipes:
            _hang_up(pipe)
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

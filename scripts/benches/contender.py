"""The asking side: a contender is started, asked, weighed and ended.

An in-process contender is one child (`child.py`). One behind HTTP is a server and a child that
loads it; its memory is the server's alone.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

HERE = Path(__file__).resolve().parent
_START_S = 300.0
_END_S = 20.0
_POLL_S = 0.01
_WEIGH_S = 0.05


class ContenderFailed(Exception):
    """It did not start, or said that it cannot do what was asked."""


class Recipe(NamedTuple):
    """How a contender is started.

    command: the child's, or the server's where there is a `port`. load: what is run to load that
    server. ready: the path that answers 200. goals: whether its figures decide anything. nice: of
    those of its processes whose command line has the word.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = {}
    port: int | None = None
    ready: str = ""
    load: tuple[str, ...] = ()
    goals: bool = True
    nice: tuple[str, int] | None = None


class Contender:
    """A running one. ready_s: from its process's start to the first possible request. operations:
    what it may be asked.
    """

    def __init__(self, recipe: Recipe, log: Path) -> None:
        self.name, self.has_goals = recipe.name, recipe.goals
        self.in_process = recipe.port is None
        self._recipe = recipe
        self._log = log.open("ab")
        self._server: subprocess.Popen[bytes] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        began = time.perf_counter()
        try:
            if recipe.port is None:
                self._child = self._start(recipe.command)
                self.operations = self._read()["ready"]
                self.ready_s = time.perf_counter() - began
            else:
                self._server = self._start(recipe.command)
                self._wait_for_server(recipe.port, recipe.ready)
                self.ready_s = time.perf_counter() - began
                self._be_nice()
                self._child = self._start(recipe.load)
                self.operations = self._read()["ready"]
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the child, and of the server that it loads."""
        return [process.pid for process in (self._child, self._server) if process is not None]

    def ask(self, op: str, **asked: Any) -> dict[str, Any]:
        """Raises ContenderFailed with what it says."""
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"op": op, **asked}).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise self._failure("has ended") from None
        return self._read()

    def weigh(self, op: str, **asked: Any) -> tuple[dict[str, Any], float]:
        """Ask, and meanwhile look at its memory: the answer and the largest sum, in bytes."""
        most, done = [0.0], threading.Event()

        def look() -> None:
            while not done.wait(_WEIGH_S):
                most[0] = max(most[0], self._bytes())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            told = self.ask(op, **asked)
        finally:
            done.set()
            thread.join()
        return told, max(most[0], self._bytes())

    def _bytes(self) -> float:
        """Resident bytes of all its processes, a shared page counted once (PSS)."""
        root = self._server or self._child
        assert root is not None
        total = 0
        try:
            first = psutil.Process(root.pid)
            for process in (first, *first.children(recursive=True)):
                total += pss_bytes(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        except (OSError, psutil.Error):
            pass  # one has just ended
        return total

    def _be_nice(self) -> None:
        if self._recipe.nice is not None:
            assert self._server is not None
            word, nice = self._recipe.nice
            for process in psutil.Process(self._server.pid).children(recursive=True):
                if any(word in part for part in process.cmdline()):
                    process.nice(nice)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        is_server = self._recipe.port is not None and self._server is None
        pipe = subprocess.DEVNULL if is_server else subprocess.PIPE
        return subprocess.Popen(
            command,
            env=_environment(self._recipe.env),
            stdin=pipe,
            stdout=self._log if is_server else pipe,
            stderr=self._log,
        )

    def _read(self) -> dict[str, Any]:
        assert self._child is not None and self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._failure("has ended")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ContenderFailed(f"{self.name}: {told['error']}")
        return told

    def _wait_for_server(self, port: int, path: str) -> None:
        assert self._server is not None
        end = time.monotonic() + _START_S
        while not _answers(port, path):
            if self._server.poll() is not None or time.monotonic() > end:
                raise self._failure("was not ready")
            time.sleep(_POLL_S)

    def _failure(self, what: str) -> ContenderFailed:
        self._log.flush()
        text = Path(self._log.name).read_text(errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        return ContenderFailed(
            f"{self.name} {what}; its log is {self._log.name}: {said[-1] if said else 'empty'}"
        )

    def close(self) -> None:
        for process in (self._child, self._server):
            if process is None:
                continue
            if process.stdin is not None:
                process.stdin.close()  # a child ends with its input
            else:
                process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._log.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def pss_bytes(rollup: str) -> int:
    """Of the text of /proc/PID/smaps_rollup."""
    [line] = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    return int(line.split()[1]) * 1024


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """A child imports what lies beside its file; a peer has its own packages and none of ours."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    if "PYTHONPATH" not in more:
        env.pop("PYTHONPATH", None)
    return {**env, **more}


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

"""A server of one's own: a child process that is started, waited for, and ended whatever happens.

It has a session of its own, so that Ctrl-C in a terminal is not for it, and writes to a log. Where
the system can (Linux), it ends with a parent that is killed too. This file does not know what the
server serves.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.parent import end_with_parent

_POLL_S = 0.1
_END_S = 20.0
_NOTICE_S = 1.0  # a connection breaks a moment before its server has ended


def free_port() -> int:
    """A port of the loopback interface that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(engine: str, port: int) -> list[str]:
    """What serves an engine directory, to this machine alone."""
    command = [sys.executable, "-m", "enginehouse.verbs.main", "serve", engine]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


class OwnServer:
    """The process of `command`, which listens on that port of 127.0.0.1; ends with the block. env:
    its whole environment; None: this process's.
    """

    def __init__(
        self, command: Sequence[str], port: int, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._port = port
        self._log = log
        self.keeps_log = False
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it takes requests. Raises EnginehouseError, with its log's last line."""
        end_s = time.monotonic() + timeout_s
        while not self._is_ready():
            try:
                self._process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() > end_s:
                    raise self._failure(f"was not ready in {timeout_s:.0f} s") from None
            else:
                raise self._failure("ended before it was ready")

    def explain(self, error: EnginehouseError) -> str:
        """What to say of a failure that may be the server's: its log's place too, and the log is to
        be kept. Raises EnginehouseError, with its log's last line, when the server has ended.
        """
        self.keeps_log = True
        try:
            self._process.wait(_NOTICE_S)
        except subprocess.TimeoutExpired:
            return f"{error} (the server's log is {self._log})"
        raise self._failure("ended") from None

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _failure(self, what: str) -> EnginehouseError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        last = f"; it said last: {said[-1]}" if said else ""
        return EnginehouseError(f"the server {what}{last} (its log is {self._log})")

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """SIGTERM, and SIGKILL to all of its group when that takes too long."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

"""`enginehouse serve` on a free port of the loopback interface, and what it shows from outside."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from enginehouse.server.client.own_server import free_port, serve_command

DEADLINE_S = 60.0
_INJECT = Path(__file__).with_name("inject")
_POLL_S = 0.05
_STOP_S = 30


class NeverHappened(Exception):
    """What was waited for."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_S) -> float:
    """How long it took until the condition held. Raises NeverHappened."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > seconds:
            raise NeverHappened(f"{what}: not in {seconds:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - began_s


class Server:
    """engine: its directory, or a link to it. env: over this process's own. log: a new file."""

    def __init__(self, engine: Path, log: Path, env: Mapping[str, str]) -> None:
        self.port = free_port()
        self.engine, self.log_path = engine, log
        path = os.pathsep.join(filter(None, (str(_INJECT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*serve_command(str(engine), self.port), "--access-log", "1"],
                env={**os.environ, "PYTHONPATH": path, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, timeout_s: float = 10) -> tuple[int, str]:
        """Status 0: there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Of every worker, as far as twenty questions can tell."""
        if self.process.poll() is not None:
            raise NeverHappened(f"the server ended with {self.process.returncode}: {self.last()}")
        return all(self.get("/health/ready")[0] == 200 for _ in range(20))

    def metrics(self) -> dict[str, float]:
        """Of those without labels; empty where there is no answer."""
        text = self.get("/metrics")[1]
        found = re.findall(r"^(\w+) ([0-9.e+-]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    @property
    def num_running(self) -> float:
        return self.metrics().get("enginehouse_num_requests_running", 0)

    @property
    def num_waiting(self) -> float:
        return self.metrics().get("enginehouse_num_requests_waiting", 0)

    def is_idle(self) -> bool:
        """Nothing runs or waits; what the KV cache holds are prefixes, which it can give back."""
        found = self.metrics()
        running, waiting = (
            found.get(f"enginehouse_num_requests_{what}") for what in ("running", "waiting")
        )
        held = found.get("enginehouse_kv_cache_sequence_bytes")
        return running == waiting == held == 0

    def host(self) -> psutil.Process | None:
        return next(iter(self._children("enginehouse-host")), None)

    def workers(self) -> list[psutil.Process]:
        return self._children("gunicorn")

    def _children(self, word: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if word in command and ("enginehouse-host" in command) == (word == "enginehouse-host"):
                found.append(child)
        return found

    def last(self) -> str:
        lines = [line for line in self.log.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> int:
        """Its exit status; it is killed when it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                each.kill()
            return self.process.wait(_STOP_S)

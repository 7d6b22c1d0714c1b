"""Clients that ask a server while its replicas are lost and exchanged, and what they saw."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from makers.gunicorn_server import Server


@contextlib.contextmanager
def ray_of_its_own() -> Iterator[None]:
    """No cluster of this machine is found, nor one that ended: in a folder that is not pytest's,
    whose names are too long for Ray's sockets.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", folder)
            patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token lands in the home directory
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            yield


class Load:
    """Clients that ask one answer after another. errors: whatever was no whole answer."""

    def __init__(self, server: Server, num_clients: int) -> None:
        self.errors: list[str] = []
        self.num_answers = 0
        self.fingerprints: set[str] = set()
        self._url = f"{server.url}/v1/chat/completions"
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,), daemon=True)
            for number in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        content = f"{number}: what is the time?"
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        while not self._ended.is_set():
            try:
                answer = httpx.post(self._url, json={"model": "tiny-llama", **body}, timeout=60)
                if answer.status_code != 200:
                    self.errors.append(answer.text)
                    continue
                self.fingerprints.add(answer.json()["system_fingerprint"])
                self.num_answers += 1
            except httpx.HTTPError as error:
                self.errors.append(repr(error))

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)


def host_pids(pid: int) -> set[int]:
    """Engine hosts among a process's descendants."""
    found = set()
    for each in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found |= {each.pid} if "enginehouse-host" in " ".join(each.cmdline()) else set()
    return found


def replicas_ready(server: Server) -> list[str]:
    """Their names, as /metrics has them."""
    return re.findall(r'^enginehouse_ready\{replica="(.+)"\} 1.0$', server.get("/metrics")[1], re.M)

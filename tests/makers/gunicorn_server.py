"""gunicorn as it is deployed, on a free port."""

from __future__ import annotations

import gc
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil

from makers.paths import ROOT

BIN = Path(sys.executable).parent
DEADLINE_S = 60
MESSAGES = [{"role": "user", "content": "What is the time?"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look every 20 ms until the condition holds; AssertionError after DEADLINE_S."""
    for _ in range(DEADLINE_S * 50):
        if condition():
            return
        select.select([], [], [], 0.02)
    raise AssertionError(f"never happened: {what}")


class Server:
    """`gunicorn -c configs/gunicorn.conf.py` on a free port of the loopback interface."""

    def __init__(self, engine: Path, log: Path, workers: int = 1) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {
            **os.environ,
            "ENGINEHOUSE_ENGINE": str(engine),
            "ENGINEHOUSE_BIND": f"127.0.0.1:{self.port}",
            "ENGINEHOUSE_WORKERS": str(workers),
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                self.command(engine), env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        wait_until(self.is_ready, "ready")

    def command(self, engine: Path) -> list[str | Path]:
        """What is run; the environment names the engine too."""
        application = "enginehouse.server.app:create_app()"
        return [BIN / "gunicorn", "-c", ROOT / "configs" / "gunicorn.conf.py", application]

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Every worker, as far as ten questions in a row can tell."""
        assert self.process.poll() is None, self.log.read_text()
        return all(self.get("/health/ready")[0] == 200 for _ in range(10))

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} ([0-9.e+-]+)$", self.get("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def host_pid(self) -> int | None:
        for child in psutil.Process(self.process.pid).children():
            try:
                if any("enginehouse-host" in word for word in child.cmdline()):
                    return child.pid
            except psutil.Error:
                continue
        return None

    @contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=60
        ) as client:
            yield client
            gc.collect()  # a stream that broke is closed before the next test is blamed for it

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

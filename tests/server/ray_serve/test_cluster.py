"""A cluster of Ray's that stands by itself, replicas that `serve run` deployed there, and a front
that is told of them: they come and go by what is asked of them, and who has had a token is told
when its replica is lost.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from enginehouse.runtime.cpu.compiler import has_compiler
from makers.engines import build_endless_engine
from makers.gunicorn_server import BIN, MESSAGES, Server, free_port, wait_until
from makers.paths import ROOT
from makers.replica_load import host_pids, ray_of_its_own, replicas_ready

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: the extra `ray`")


class ClusterServer(Server):
    def command(self, engine: Path) -> list[str | Path]:
        return [BIN / "enginehouse", "serve", engine, "--ray", "--port", str(self.port)]


@contextmanager
def head_node(folder: Path) -> Iterator[psutil.Process]:
    """`ray start --head` until the end; RAY_ADDRESS names it."""
    ports = ["--port", str(free_port()), "--ray-client-server-port", str(free_port())]
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", "2", *ports]
    command += ["--include-dashboard", "false"]
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: "Ray runtime started" in (folder / "ray.log").read_text(), "Ray is up")
        told = re.search(r"ray start --address='([\w.:]+)'", (folder / "ray.log").read_text())
        assert told
        os.environ["RAY_ADDRESS"] = told[1]
        yield psutil.Process(process.pid)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        _, left = psutil.wait_procs(family, timeout=30)
        for each in left:
            each.kill()


class Asker(threading.Thread):
    """Asks for one long answer after another until it is told to stop. errors: what was none."""

    def __init__(self, server: Server, number: int) -> None:
        super().__init__(daemon=True)
        self._url, self._stopped = f"{server.url}/v1/chat/completions", threading.Event()
        messages = [{"role": "user", "content": f"{number}: go on"}]
        self._body = {"model": "tiny-llama", "messages": messages, "max_tokens": 2000}
        self.errors: list[str] = []
        self.start()

    def run(self) -> None:
        while not self._stopped.is_set():
            answer = httpx.post(self._url, json=self._body, timeout=60)
            if answer.status_code != 200:
                self.errors.append(answer.text)

    def stop(self) -> None:
        self._stopped.set()
        self.join(60)


def test_replicas_follow_the_queue_and_who_had_a_token_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_endless_engine(tmp_path, backend="cpu" if has_compiler() else "torch")
    key = tmp_path / "host.key"
    key.write_text(secrets.token_hex(32))
    recipe = yaml.safe_load((ROOT / "configs" / "deploy" / "ray" / "serve.yaml").read_text())
    [application] = recipe["applications"]
    soon = {"look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 4}
    application["args"] |= {"engine": str(engine), "key_file": str(key), "num_gpus": 0}
    application["args"] |= {"min_replicas": 1, "max_replicas": 2, "target": 1, "num_cpus": 1}
    application["args"] |= {"autoscaling": soon}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("ENGINEHOUSE_HOST_KEY_FILE", str(key))
    with ray_of_its_own(), head_node(tmp_path) as head:
        run = [BIN / "serve", "run", tmp_path / "serve.yaml", "--non-blocking"]
        subprocess.run([*run, "--address", os.environ["RAY_ADDRESS"]], check=True, timeout=120)
        server = ClusterServer(engine, tmp_path / "log")
        try:
            wait_until(lambda: len(replicas_ready(server)) == 1, "one is deployed")
            askers = [Asker(server, number) for number in range(4)]
            wait_until(lambda: len(replicas_ready(server)) == 2, "a second one, as four ask")
            for asker in askers:
                asker.stop()
            last = Asker(server, 9)
            wait_until(lambda: len(replicas_ready(server)) == 1, "one is given back")
            last.stop()
            assert not [error for asker in [*askers, last] for error in asker.errors]
            wait_until(lambda: len(host_pids(head.pid)) == 1, "and its host has ended")
            assert told_of_the_loss(server, host_pids(head.pid)) == "engine_unavailable"
            wait_until(lambda: len(replicas_ready(server)) == 1, "its host is started again")
        finally:
            assert server.stop() == 0


def told_of_the_loss(server: Server, hosts: set[int]) -> str:
    """The code of the error that ends a stream whose host is killed behind the first token."""
    body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 8000, "stream": True}
    texts, code = 0, ""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            code = event.get("error", {}).get("code", code)
            texts += bool(event.get("choices") and event["choices"][0]["delta"].get("content"))
            if texts == 1 and hosts:
                os.kill(hosts.pop(), signal.SIGKILL)
    assert texts
    return code

"""Two replicas that Ray Serve runs, behind gunicorn: one host is killed and the engine is exchanged
while clients ask, and none sees an error.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from enginehouse.runtime.cpu.compiler import has_compiler
from makers.engines import build_endless_engine
from makers.gunicorn_server import BIN, Server, wait_until
from makers.replica_load import Load, host_pids, ray_of_its_own, replicas_ready

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: the extra `ray`")


class RayServer(Server):
    def command(self, engine: Path) -> list[str | Path]:
        port = ["--port", str(self.port)]
        return [BIN / "enginehouse", "serve", engine, "--ray", "--replicas", "2", *port]


def test_ray_replicas_are_killed_and_exchanged_and_nobody_sees_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "cpu" if has_compiler() else "torch"
    for name, more in (("old", {}), ("new", {"kv_cache_dtype": "int8"})):
        build_endless_engine(tmp_path / name, backend=backend, **more)
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "old" / "engine")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with ray_of_its_own():
        lose_and_exchange(current, tmp_path)


def lose_and_exchange(current: Path, tmp_path: Path) -> None:
    server = RayServer(current, tmp_path / "log")
    pid = server.process.pid
    try:
        wait_until(lambda: len(replicas_ready(server)) == 2, "both are ready")
        first = host_pids(pid)
        with Load(server, 2) as load:
            wait_until(lambda: load.num_answers > 10, "they are asked")
            os.kill(min(first), signal.SIGKILL)
            wait_until(lambda: len(host_pids(pid) - {min(first)}) == 2, "another is started")
            wait_until(lambda: len(replicas_ready(server)) == 2, "and answers")
            assert load.num_answers > 10 and not load.errors
            second = host_pids(pid)
            current.with_name("other").symlink_to(tmp_path / "new" / "engine")
            current.with_name("other").replace(current)
            wait_until(lambda: len(load.fingerprints) == 2, "the new engine answers")
            wait_until(lambda: not second & host_pids(pid), "the old hosts have ended")
            wait_until(lambda: len(replicas_ready(server)) == 2, "there are two")
        assert not load.errors
    finally:
        family = psutil.Process(pid).children(recursive=True)
        assert server.stop() == 0
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left


def test_scaling_follows_what_runs_and_waits() -> None:
    from enginehouse.server.ray_serve.directory import by_queue_depth

    def wanted(running: dict[str, float], waiting: dict[str, float], **more: Any) -> int:
        context = SimpleNamespace(
            aggregated_metrics={"num_running": running, "num_waiting": waiting},
            config=SimpleNamespace(target_ongoing_requests=4.0),
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
            **more,
        )
        return by_queue_depth(context)[0]

    assert wanted({}, {}) == 1
    assert wanted({"a": 4.0, "b": 4.0}, {"a": 0.0, "b": 1.0}) == 3
    assert wanted({"a": 4.0}, {"a": 400.0}) == 8


def test_who_says_nothing_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from enginehouse.server.ray_serve import directory
    from enginehouse.server.replicas.replicas_file import Replica

    now = [100.0]
    monkeypatch.setattr(directory.time, "monotonic", lambda: now[0])
    leases, a, b = directory.Leases(5.0), Replica("a", "tcp://a:1"), Replica("b", "tcp://b:1")
    leases.put(a)
    now[0] = 104.0
    leases.put(b)
    assert leases.replicas() == [a, b]
    now[0] = 105.5
    assert leases.replicas() == [b]
    leases.remove("b")
    leases.remove("never there")
    assert leases.replicas() == []

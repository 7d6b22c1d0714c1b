"""`--replicas 2` as it is deployed: one host is killed under load, the engine is exchanged under
load, and nobody who asks sees an error.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.launch import shares
from enginehouse.server.launch.shares import shares_of
from makers.engines import EngineMaker, build_endless_engine
from makers.gunicorn_server import Server, wait_until
from makers.replica_load import Load, host_pids, replicas_ready


def test_a_host_is_killed_and_the_engine_exchanged_and_nobody_sees_an_error(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_endless_engine(tmp_path, kv_cache_dtype="int8")
    monkeypatch.setenv("ENGINEHOUSE_REPLICAS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    current = tmp_path / "current"
    current.symlink_to(engine)
    server = Server(current, tmp_path / "log")
    wait_until(lambda: replicas_ready(server) == ["engine-0", "engine-1"], "both are ready")
    pid = server.process.pid
    first = host_pids(pid)
    threads = [" ".join(psutil.Process(pid).cmdline()) for pid in first]
    assert len(first) == 2 and all("--num-threads 1" in command for command in threads)
    with Load(server, 3) as load:
        wait_until(lambda: load.num_answers > 20, "they are asked")
        before = load.num_answers
        os.kill(min(first), signal.SIGKILL)
        wait_until(lambda: len(host_pids(pid) - {min(first)}) == 2, "another one is started")
        wait_until(lambda: len(replicas_ready(server)) == 2, "and is ready")
        assert load.num_answers > before and not load.errors
        current.with_name("next").symlink_to(other)
        current.with_name("next").replace(current)
        second = host_pids(pid)
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: len(load.fingerprints) == 2, "the new engine answers")
        wait_until(lambda: not second & host_pids(pid), "the old hosts have ended")
        wait_until(lambda: len(replicas_ready(server)) == 2, "there are two")
    assert not load.errors
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.stop() == 0


def test_each_replica_has_its_share_of_the_machine(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()  # which may be on GPUs
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(shares, "visible_gpus", lambda env: [])
    assert shares_of(engine, 1, {}) == [((), {})]
    assert shares_of(engine, 3, {}) == [(("--num-threads", "2", "--shared-weights"), {})] * 3
    apart = shares_of(engine, 3, {"ENGINEHOUSE_SHARED_WEIGHTS": "0"})
    assert apart == [(("--num-threads", "2"), {})] * 3
    gpus = [type("Gpu", (), {"uuid": f"GPU-{number}"}) for number in range(2)]
    monkeypatch.setattr(shares, "visible_gpus", lambda env: gpus)
    found = [share.env for share in shares_of(engine, 2, {})]
    assert found == [{"CUDA_VISIBLE_DEVICES": "GPU-0"}, {"CUDA_VISIBLE_DEVICES": "GPU-1"}]
    assert shares_of(engine, 2, {"ENGINEHOUSE_DEVICE": "cpu"})[0].flags[:2] == (
        "--num-threads",
        "3",
    )
    with pytest.raises(EnginehouseError, match="3 replicas .* 2 are visible"):
        shares_of(engine, 3, {})

"""An engine of two ranks on two nodes, the second of which `enginehouse-launch --worker` is, with
ranks on doubles: what the engine answers before and after it is started again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.tensorrt_machine import (
    doubled_engine,
    doubled_machine,
    greedy,
    requests,
    torch_answers,
)
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import ExecutorOptions, RemoteRanks, generate
from makers.engines import SourceMaker
from makers.gunicorn_server import BIN, free_port, wait_until
from makers.paths import TESTS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_workers_rank_serves_an_engine_and_the_one_that_is_started_after_it(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = doubled_engine(
        family_source("qwen2"), tmp_path / "e", quant="int4", tp=2, max_seq_len=128
    )
    work = requests([[5, 6, 7], [11]], greedy(8))
    wanted = torch_answers(engine, work)
    key, program, address = tmp_path / "key", tmp_path / "bin", f"127.0.0.1:{free_port()}"
    key.write_text("0" * 64)
    program.mkdir()
    stub = program / "enginehouse-rank"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -m doubles.tensorrt_rank_process "$@"\n')
    stub.chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{program}:{os.environ['PATH']}", "PYTHONPATH": str(TESTS)},
        **{"OMP_NUM_THREADS": "1", "ENGINEHOUSE_RANKS_ADDRESS": address},
    }
    words = ["--worker", "--ranks-key", key, "--nodes", "2", "--node", "1", "--leader", "127.0.0.1"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [BIN / "enginehouse-launch", engine, *words, "--ready-file", tmp_path / "ready"]
        worker = subprocess.Popen(command, env=environment, stderr=file)
    try:
        with doubled_machine(monkeypatch, 1, processes=True):
            for life in (1, 2):
                options = ExecutorOptions(remote_ranks=RemoteRanks(address, key), start_s=60)
                executor = open_executor(engine, options)
                assert generate(executor, work) == wanted
                executor.close()
                said = f"rank 1 has ended (status 0): it comes back to its leader in {life} s"
                wait_until(lambda said=said: said in log.read_text(), said)  # type: ignore[misc]
        wait_until((tmp_path / "ready").exists, "a third process waits for the leader")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()

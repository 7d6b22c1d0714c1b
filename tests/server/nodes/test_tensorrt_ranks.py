"""Ranks of TensorRT plans over nodes: which run where, and the program that keeps a node's running.

`enginehouse-rank` is a stub on PATH, which says how it was started and does as a file tells it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enginehouse.runtime.errors import EngineError, EnginehouseError
from enginehouse.server.launch import launcher
from enginehouse.server.nodes import tensorrt_ranks
from enginehouse.server.nodes.tensorrt_ranks import (
    Node,
    find_node,
    leader_settings,
    rank_commands,
    ranks_per_node,
)
from makers.gunicorn_server import BIN, wait_until
from makers.paper_engines import paper_engine
from makers.paths import ROOT

GROUP = {
    "LWS_LEADER_ADDRESS": "big-3.big.models",
    "LWS_GROUP_SIZE": "3",
    "LWS_WORKER_INDEX": "2",
}
ENGINE = Path("/engines/e")
# Says each start and end in a file of its rank; a file of statuses says how its lives end, one a
# line, and without one left it runs until a signal comes.
STUB = """#!/bin/sh
log="$STUB_DIR/rank-$3"
end() { echo "ended by $1" >> "$log"; exit 0; }
trap 'end TERM' TERM
trap 'end INT' INT
echo "$CUDA_VISIBLE_DEVICES $*" >> "$log"
if [ -s "$STUB_DIR/statuses-$3" ]; then
  read -r status < "$STUB_DIR/statuses-$3"
  sed -i 1d "$STUB_DIR/statuses-$3"
  [ "$status" = 2 ] && echo "enginehouse-rank: no such engine" >&2
  [ "$status" = KILL ] && kill -9 $$
  exit "$status"
fi
while :; do sleep 0.05; done
"""


def test_a_pods_node_is_what_its_set_says_and_flags_go_before() -> None:
    assert find_node(GROUP) == Node(2, 3, "big-3.big.models")
    assert find_node({}, number=1, num_nodes=2, leader="first") == Node(1, 2, "first")
    assert find_node(GROUP, number=1) == Node(1, 3, "big-3.big.models")
    for left_out in GROUP:
        env = {name: text for name, text in GROUP.items() if name != left_out}
        with pytest.raises(EnginehouseError, match="as a LeaderWorkerSet sets them, or --node"):
            find_node(env)
    for number in (0, 3):
        with pytest.raises(EnginehouseError, match=rf"node {number} of 3 is no worker; .* 1 to 2"):
            find_node(GROUP, number=number)


def test_ranks_follow_the_order_of_nodes_and_each_has_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_ranks.shutil, "which", lambda name, path: f"/bin/{name}")
    node = Node(2, 3, "first")
    made = rank_commands(ENGINE, 6, node, Path("/key"), {})
    assert [(each.rank, each.gpu) for each in made] == [(4, "0"), (5, "1")]
    assert made[1].command == [
        *("/bin/enginehouse-rank", "/engines/e", "--rank", "5"),
        *("--leader", "first:5600", "--key-file", "/key"),
    ]
    env = {"CUDA_VISIBLE_DEVICES": "4,GPU-b,6", "ENGINEHOUSE_RANKS_ADDRESS": "0.0.0.0:77"}
    made = rank_commands(ENGINE, 6, node, Path("/key"), env)
    assert [each.gpu for each in made] == ["4", "GPU-b"]
    assert made[0].command[5] == "first:77"
    with pytest.raises(EngineError, match="=4 names 1 GPUs; /engines/e takes 2 of each of 3 nodes"):
        rank_commands(ENGINE, 6, node, Path("/key"), {"CUDA_VISIBLE_DEVICES": "4"})
    for nodes in (4, 12):
        with pytest.raises(EngineError, match=rf"{nodes} nodes alike; wanted --nodes 1, 2, 3, 6"):
            ranks_per_node(ENGINE, 6, nodes)


def test_the_leader_waits_on_all_addresses_for_a_group_of_its_size() -> None:
    assert leader_settings({}, Path("/key"), 3, 2) == {
        "ENGINEHOUSE_RANKS_ADDRESS": "0.0.0.0:5600",
        "ENGINEHOUSE_RANKS_KEY_FILE": "/key",
        "ENGINEHOUSE_LOCAL_RANKS": "2",
    }
    own = {"ENGINEHOUSE_RANKS_ADDRESS": "10.0.0.1:77", **GROUP}
    assert leader_settings(own, Path("/key"), 3, 2)["ENGINEHOUSE_RANKS_ADDRESS"] == "10.0.0.1:77"
    with pytest.raises(EnginehouseError, match="there are 3 pods in the group; wanted --nodes 3"):
        leader_settings(GROUP, Path("/key"), 2, 2)


class Worker:
    """`enginehouse-launch --worker` of node 1 of 2, whose ranks are 2 and 3."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ready, self.log = folder, folder / "ready", folder / "log"
        self.engine = paper_engine(folder / "e", "tensorrt", tp=4, targets=[90])
        (folder / "key").write_text("0" * 64)
        (folder / "bin").mkdir()
        self.stub = folder / "bin" / "enginehouse-rank"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)
        path = f"{folder / 'bin'}:/usr/bin:/bin"
        self.env = {**os.environ, "PATH": path, "STUB_DIR": str(folder)}
        self.process: subprocess.Popen[bytes] | None = None

    def will_end(self, rank: int, *statuses: str) -> None:
        (self.folder / f"statuses-{rank}").write_text("".join(f"{each}\n" for each in statuses))

    def start(self) -> subprocess.Popen[bytes]:
        code = "import sys; from enginehouse.server.launch.launcher import main; sys.exit(main())"
        words = [str(self.engine), "--worker", "--ranks-key", str(self.folder / "key")]
        words += ["--node", "1", "--nodes", "2", "--leader", "first"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words, "--ready-file", str(self.ready)],
                env=self.env,
                stderr=log,
            )
        return self.process

    def lines(self, rank: int) -> list[str]:
        file = self.folder / f"rank-{rank}"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def started(worker: Worker, counts: dict[int, int]) -> Callable[[], bool]:
    return lambda: all(len(worker.lines(rank)) == count for rank, count in counts.items())


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, "ended by TERM"), (signal.SIGINT, "ended by INT")]
)
def test_each_gpu_has_its_rank_and_a_signal_ends_all_of_them(
    worker: Worker, number: signal.Signals, said: str
) -> None:
    process = worker.start()
    wait_until(lambda: worker.ready.exists() and started(worker, {2: 1, 3: 1})(), "they run")
    rest = f"--leader first:5600 --key-file {worker.folder / 'key'}"
    assert worker.lines(2) == [f"0 {worker.engine} --rank 2 {rest}"]
    assert worker.lines(3) == [f"1 {worker.engine} --rank 3 {rest}"]
    process.send_signal(number)
    assert process.wait(30) == 0
    assert [worker.lines(rank)[1:] for rank in (2, 3)] == [[said], [said]]
    assert not worker.ready.exists()


@pytest.mark.parametrize("how", ["0", "75", "KILL"])
def test_a_rank_that_has_lost_its_leader_comes_back_to_it(worker: Worker, how: str) -> None:
    worker.will_end(3, how)
    worker.start()
    wait_until(started(worker, {2: 1, 3: 2}), "rank 3 came back, and rank 2 was left alone")
    assert worker.lines(3)[0] == worker.lines(3)[1]
    wait_until(worker.ready.exists, "all of them run")
    assert "rank 3 has ended" in worker.log.read_text()


@pytest.mark.parametrize("status", ["1", "2", "127"])
def test_a_rank_that_refuses_ends_the_others_in_a_sentence(worker: Worker, status: str) -> None:
    worker.will_end(3, "75", status)
    process = worker.start()
    assert process.wait(30) == 2
    said = worker.log.read_text()
    assert f"enginehouse-launch: rank 3 has refused (exit status {status}), and starting" in said
    assert ("enginehouse-rank: no such engine" in said) == (status == "2")
    assert worker.lines(2)[-1] == "ended by TERM"
    assert not worker.ready.exists()


def test_no_rank_outlives_a_worker_that_is_killed(worker: Worker) -> None:
    process = worker.start()
    wait_until(worker.ready.exists, "they run")
    wait_until(started(worker, {2: 1, 3: 1}), "both have said so")
    process.kill()
    for rank in (2, 3):
        wait_until(lambda rank=rank: worker.lines(rank)[-1] == "ended by TERM", "it ended too")  # type: ignore[misc]


def test_a_node_without_the_program_says_what_is_wanted(worker: Worker) -> None:
    worker.stub.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_ranks.sys, "executable", str(worker.folder / "python"))
        with pytest.raises(EnginehouseError, match=r"^enginehouse-rank is not on PATH, nor beside"):
            rank_commands(worker.engine, 4, Node(1, 2, "first"), Path("/key"), worker.env)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "3"], "the 4 ranks of .* cannot be laid on 3 nodes alike"),
        (["--nodes", "2", "--worker"], "wanted LWS_WORKER_INDEX, LWS_GROUP_SIZE and LWS_LEADER"),
    ],
)
def test_what_a_node_cannot_do_is_refused(
    words: list[str], said: str, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    key = worker.folder / "key"
    assert launcher.main([str(worker.engine), "--ranks-key", str(key), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("enginehouse-launch: ") and re.search(said, error)


def test_flags_that_do_not_go_together_are_refused(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ["--ranks-key", str(worker.folder / "key")]
    for words, said in (
        (["--worker"], "--worker wants --ssh-keys, or of TensorRT plans --ranks-key"),
        ([*key, "--ssh-keys", "keys"], "give one"),
        ([*key, "--launcher", "srun"], "leave --launcher, --hostfile out"),
        ([*key, "--node", "1"], "are for --worker with --ranks-key"),
    ):
        with pytest.raises(SystemExit):
            launcher.main([str(worker.engine), *words])
        assert said in capsys.readouterr().err


def test_a_key_is_for_plans_alone_and_plans_over_nodes_want_one(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = paper_engine(tmp_path / "compiled", tp=8, pp=2)
    key = ["--ranks-key", str(worker.folder / "key")]
    for words in ([], ["--worker", "--node", "1", "--leader", "first"]):
        assert launcher.main([str(compiled), "--nodes", "2", *key, *words]) == 2
        assert "holds no TensorRT plans (backend=tensorrt)" in capsys.readouterr().err
    assert launcher.main([str(worker.engine), "--nodes", "2", "--launcher", "mpirun"]) == 2
    assert "with --ranks-key, and leave --launcher out" in capsys.readouterr().err
    (worker.folder / "key").write_text("short")
    assert launcher.main([str(worker.engine), "--nodes", "2", *key]) == 2
    assert "holds 5 characters in 1 lines; wanted one line" in capsys.readouterr().err


SLURM = ROOT / "configs" / "deploy" / "slurm" / "serve-ranks.sh"
TASK = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}


def slurm_task(worker: Worker, **changed: str) -> subprocess.CompletedProcess[str]:
    env = {**worker.env, **TASK, "LEADER": "first", "ENGINE": str(worker.engine), **changed}
    env["KEY"] = str(worker.folder / "key")
    return subprocess.run([SLURM], env=env, capture_output=True, text=True, timeout=60)


def install_launch(worker: Worker) -> None:
    (worker.stub.parent / "enginehouse-launch").symlink_to(BIN / "enginehouse-launch")


def test_a_task_of_slurm_ends_with_a_rank_that_refuses(worker: Worker) -> None:
    install_launch(worker)
    worker.will_end(2, "75", "2")
    done = slurm_task(worker, RANKS_PORT="77")
    assert done.returncode == 2
    assert "rank 2 has refused (exit status 2)" in done.stderr
    assert "--rank 2 --leader first:77" in worker.lines(2)[0], "the port is the server's"


def test_a_task_of_slurm_says_what_is_missing(worker: Worker) -> None:
    done = slurm_task(worker)
    assert done.returncode == 127
    assert "enginehouse-launch is not on PATH on " in done.stderr
    install_launch(worker)
    done = slurm_task(worker, SLURM_NTASKS="8")
    assert done.returncode == 2
    assert "8 tasks on 2 nodes; wanted one on each" in done.stderr


def test_a_job_of_slurm_starts_the_server_on_its_first_node(worker: Worker) -> None:
    for name in ("srun", "enginehouse-launch"):
        stub = worker.stub.with_name(name)
        stub.write_text('#!/bin/sh\nenv | grep -E "^ENGINEHOUSE_|^LEADER="\necho "$0 $*"\n')
        stub.chmod(0o755)
    job = slurm_task(worker, SLURM_STEP_ID="batch", SLURMD_NODENAME="n1", SLURM_CPUS_PER_TASK="8")
    flags = f"--cpus-per-task=8 --kill-on-bad-exit=1 --wait=60 {SLURM}"
    assert "LEADER=n1" in job.stdout.splitlines()
    assert job.stdout.splitlines()[-1] == f"{worker.stub.with_name('srun')} {flags}"
    task = slurm_task(worker, SLURM_PROCID="0")
    assert {
        *("ENGINEHOUSE_RANKS_ADDRESS=0.0.0.0:5600", "ENGINEHOUSE_BIND=0.0.0.0:8000"),
        f"{worker.stub.with_name('enginehouse-launch')} {worker.engine} --nodes 2 --ranks-key "
        f"{worker.folder / 'key'}",
    } <= set(task.stdout.splitlines())

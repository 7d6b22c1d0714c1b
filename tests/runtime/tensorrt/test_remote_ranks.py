"""Ranks that come over TCP: who is let in, and an engine of two ranks on two "nodes", which are two
network namespaces of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from doubles.tensorrt_machine import (
    doubled_engine,
    doubled_machine,
    greedy,
    requests,
    torch_answers,
)
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, RemoteRanks, generate
from enginehouse.runtime.request import Request
from enginehouse.runtime.tensorrt import rank as rank_program
from enginehouse.runtime.tensorrt.remote_ranks import (
    LeaderLost,
    accept_ranks,
    join_leader,
    split_address,
)
from makers.engines import SourceMaker
from makers.paths import TESTS

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = b"a-secret-of-thirty-two-characters"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def engine_of_two_ranks(family_source: SourceMaker, folder: Path) -> Path:
    return doubled_engine(family_source("qwen2"), folder / "e", quant="none", tp=2, max_seq_len=128)


class Leader(threading.Thread):
    """Waits for ranks 1 and 2 of an engine."""

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__(daemon=True)
        self.address = f"127.0.0.1:{free_port()}"
        self.found: dict[int, Connection] = {}
        self.failed: EngineError | None = None
        self._seconds = seconds
        self.start()

    def run(self) -> None:
        try:
            waits = self.address, SECRET, (1, 2), "sha256:ours", {"x": 5}, self._seconds
            self.found = accept_ranks(*waits)
        except EngineError as error:
            self.failed = error


def test_ranks_come_in_any_order_and_talk_through_their_pipes() -> None:
    leader = Leader()
    joined = {n: join_leader(leader.address, SECRET, n, "sha256:ours", 30) for n in (2, 1)}
    leader.join(30)
    for rank, (pipe, told) in joined.items():
        assert told == {"x": 5}
        leader.found[rank].send_bytes(b"do")
        assert pipe.recv_bytes() == b"do"
        pipe.close()
        with pytest.raises((EOFError, OSError)):
            leader.found[rank].recv_bytes()
        leader.found[rank].close()


@pytest.mark.parametrize(
    ("secret", "rank", "digest", "said"),
    [
        (b"another", 1, "sha256:ours", "has another secret in its key file"),
        (SECRET, 3, "sha256:ours", "rank 3 is not waited for; wanted one of 1, 2"),
        (SECRET, 1, "sha256:theirs", "has the engine sha256:theirs, and the leader sha256:ours"),
    ],
)
def test_who_is_no_rank_of_this_engine_is_told_why_and_the_leader_goes_on(
    secret: bytes, rank: int, digest: str, said: str
) -> None:
    leader = Leader()
    with pytest.raises(EngineError, match=said):
        join_leader(leader.address, secret, rank, digest, 30)
    pipes = [join_leader(leader.address, SECRET, n, "sha256:ours", 30)[0] for n in (1, 2)]
    leader.join(30)
    assert sorted(leader.found) == [1, 2]
    for pipe in [*pipes, *leader.found.values()]:
        pipe.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64])
def test_a_stranger_is_sent_away(said: bytes) -> None:
    leader = Leader()
    host, port = split_address(leader.address)
    for _ in range(100):
        try:
            stranger = socket.create_connection((host, port))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    with stranger:
        with suppress(OSError):  # it may have been sent away already
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
        pipes = [join_leader(leader.address, SECRET, n, "sha256:ours", 30)[0] for n in (1, 2)]
        leader.join(30)
    assert sorted(leader.found) == [1, 2]
    for pipe in [*pipes, *leader.found.values()]:
        pipe.close()


def test_a_rank_whose_place_is_taken_may_come_again_and_one_that_nobody_waits_for_may_not() -> None:
    leader = Leader()
    first, _ = join_leader(leader.address, SECRET, 1, "sha256:ours", 30)
    with pytest.raises(LeaderLost, match="rank 1 has come already, and its place is not free yet"):
        join_leader(leader.address, SECRET, 1, "sha256:ours", 30)
    with pytest.raises(EngineError, match="rank 5 is not waited for") as refused:
        join_leader(leader.address, SECRET, 5, "sha256:ours", 30)
    assert not isinstance(refused.value, LeaderLost)
    second, _ = join_leader(leader.address, SECRET, 2, "sha256:ours", 30)
    leader.join(30)
    for pipe in [first, second, *leader.found.values()]:
        pipe.close()


def test_who_does_not_come_is_named_on_both_sides() -> None:
    leader = Leader(seconds=2)
    pipe, _ = join_leader(leader.address, SECRET, 2, "sha256:ours", 30)
    leader.join(30)
    pipe.close()
    assert str(leader.failed).startswith(f"ranks 1 have not come to {leader.address} in 2 s")
    with pytest.raises(LeaderLost, match="no leader listens at"):
        join_leader(leader.address, SECRET, 1, "sha256:ours", 0)
    for address in ("nowhere", "host:", ":5", "h:99999", "h:x"):
        with pytest.raises(EngineError, match="wanted HOST:PORT"):
            split_address(address)
    assert split_address("[::1]:80") == ("::1", 80)


@pytest.fixture
def node() -> Iterator[tuple[str, list[str]]]:
    """The leader's address on a network of its own, and what runs a program on its other end."""
    name, number = f"eh-{os.getpid()}", os.getpid() % 250
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("no network namespaces: wanted root, and `ip` of iproute2")
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("no network namespaces: `ip netns add` is not allowed here")
    ours, theirs = f"10.213.{number}.1", f"10.213.{number}.2"
    inside = ["ip", "netns", "exec", name]
    try:
        for command in (
            ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"],
            ["ip", "link", "set", f"{name}b", "netns", name],
            ["ip", "addr", "add", f"{ours}/24", "dev", f"{name}a"],
            ["ip", "link", "set", f"{name}a", "up"],
            [*inside, "ip", "addr", "add", f"{theirs}/24", "dev", f"{name}b"],
            [*inside, "ip", "link", "set", f"{name}b", "up"],
        ):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip(f"no network namespaces: `{' '.join(command)}` is not allowed here")
        yield f"{ours}:{free_port(ours)}", inside
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_two_ranks_in_two_network_namespaces_answer_as_the_torch_backend(
    node: tuple[str, list[str]],
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`enginehouse-rank` on the second, on doubles as this process is; then it is lost."""
    address, inside = node
    key = tmp_path / "key"
    key.write_bytes(SECRET)
    settings = dict(quant="int4", tp=2, max_seq_len=128)
    engine = doubled_engine(family_source("qwen2"), tmp_path / "e", **settings)
    stem = list(range(40, 70))
    work = requests([stem, [5, 6], [11], [*stem, 3]], greedy(8))
    wanted = torch_answers(engine, work)
    command = [*inside, sys.executable, "-m", "doubles.tensorrt_rank_process", str(engine)]
    command += ["--rank", "1", "--leader", address, "--key-file", str(key)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        with doubled_machine(monkeypatch, 1, processes=True):  # this node has one GPU
            options = ExecutorOptions(remote_ranks=RemoteRanks(address, key), start_s=60)
            executor = open_executor(engine, options)
            assert generate(executor, work) == wanted
            executor.submit(Request(9, [5, 6, 7], greedy(50)))
            executor.poll()
            process.send_signal(signal.SIGKILL)
            runner: Any = executor.runner  # type: ignore[attr-defined]
            deadline_s = time.monotonic() + 20
            while not runner._rank.communicator.aborted:
                assert time.monotonic() < deadline_s, "nobody noticed"
                time.sleep(0.01)
            with pytest.raises(EngineError, match=r"^rank 1 of 2 ended \(its connection is lost"):
                executor.poll()
            executor.close()
    finally:
        process.kill()
        process.wait()


def test_an_engine_of_another_backend_has_no_such_ranks(tmp_path: Path, make_engine: Any) -> None:
    options = ExecutorOptions(remote_ranks=RemoteRanks("127.0.0.1:9", tmp_path / "key"))
    with pytest.raises(EngineError, match=r"are of backend=tensorrt, and .* leave --ranks-address"):
        open_executor(make_engine(), options)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank", "1"], "--leader and --key-file are wanted"),
        (["--rank", "2", "--leader", "h:1", "--key-file", "k"], "--rank 2; .* has ranks 1 to 1"),
        (["--rank", "1", "--leader", "h:1", "--key-file", "k"], "the key file k cannot be read"),
    ],
)
def test_the_program_refuses_in_a_sentence(
    flags: list[str],
    said: str,
    family_source: SourceMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = engine_of_two_ranks(family_source, tmp_path)
    if "--leader" in flags:
        assert rank_program.main([str(engine), *flags]) == 2
    else:
        with pytest.raises(SystemExit, match="2"):
            rank_program.main([str(engine), *flags])
    assert re.search(said, capsys.readouterr().err)


def test_the_exit_status_says_whether_to_come_again(
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = engine_of_two_ranks(family_source, tmp_path)
    key = tmp_path / "key"
    key.write_bytes(SECRET)
    command = [str(engine), "--rank", "1", "--key-file", str(key)]
    nobody = f"127.0.0.1:{free_port()}"
    assert rank_program.main([*command, "--leader", nobody, "--wait-s", "0"]) == os.EX_TEMPFAIL
    assert f"enginehouse-rank: no leader listens at {nobody}" in capsys.readouterr().err
    leader = Leader()
    assert rank_program.main([*command, "--leader", leader.address]) == 2
    assert "rank 1 has the engine sha256:" in capsys.readouterr().err
    for rank in (1, 2):
        join_leader(leader.address, SECRET, rank, "sha256:ours", 30)[0].close()
    leader.join(30)
    for pipe in leader.found.values():
        pipe.close()


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (None, 0, ""),
        (EngineError("the kernel refuses"), os.EX_TEMPFAIL, "enginehouse-rank: the kernel refuses"),
        (RuntimeError("CUDA error"), os.EX_TEMPFAIL, "enginehouse-rank: CUDA error"),
    ],
)
def test_a_rank_that_fails_beside_its_leader_says_so_to_both_and_may_come_again(
    failure: Exception | None,
    status: int,
    said: str,
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = engine_of_two_ranks(family_source, tmp_path)
    ours, theirs = Pipe()
    closed = []

    class Loaded:
        def __init__(self, *given: Any) -> None: ...

        def close(self) -> None:
            closed.append(self)

    def follow(rank: Any, pipe: Connection) -> None:
        if failure is not None:
            raise failure

    for name, double in (
        ("_leader_of", lambda args, engine: (theirs, 128)),
        ("check_machine", lambda engine, count: (None, None)),
        ("TensorRTRank", Loaded),
        ("follow", follow),
    ):
        monkeypatch.setattr(rank_program, name, double)
    command = [str(engine), "--rank", "1", "--leader", "h:1", "--key-file", "k"]
    assert rank_program.main(command) == status
    assert said in capsys.readouterr().err and len(closed) == 1
    assert ours.poll() == (failure is not None)
    if failure is not None:
        assert ours.recv_bytes() == f'{{"error": "{failure}"}}'.encode()
    ours.close()
    theirs.close()

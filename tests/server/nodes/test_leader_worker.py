"""Pods of a LeaderWorkerSet: who they are, and that the leader waits until they listen."""

from __future__ import annotations

import shlex
import socket
import threading
from pathlib import Path

import pytest

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.launch import launcher
from enginehouse.server.nodes.leader_worker import (
    KEY_FILES,
    group_hosts,
    sshd_command,
    wait_for_workers,
)
from makers.paper_engines import paper_engine

GROUP = {"LWS_LEADER_ADDRESS": "big-3.big.models", "LWS_GROUP_SIZE": "3"}


def test_the_workers_names_come_from_the_leaders() -> None:
    """As LeaderWorkerSet names its pods: the leader NAME-GROUP, a worker NAME-GROUP-INDEX."""
    hosts = ["big-3.big.models", "big-3-1.big.models", "big-3-2.big.models"]
    assert group_hosts(GROUP) == hosts
    for wrong in ({}, {**GROUP, "LWS_GROUP_SIZE": "two"}, {**GROUP, "LWS_LEADER_ADDRESS": "big"}):
        with pytest.raises(EnginehouseError, match="wanted the two that a LeaderWorkerSet gives"):
            group_hosts(wrong)


def test_the_leader_waits_for_who_comes_late_and_names_who_does_not_come() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))  # bound, and not listening yet: refused
        port = late.getsockname()[1]
        timer = threading.Timer(0.1, late.listen)
        timer.start()
        wait_for_workers(["127.0.0.1"], port, seconds=20, pause_s=0.01)
        timer.join()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(EnginehouseError, match=rf"127.0.0.1: nothing listens on port {port}"):
            wait_for_workers(["127.0.0.1"], port, seconds=0, pause_s=0)


def test_a_worker_hands_on_where_programs_are(tmp_path: Path) -> None:
    command = sshd_command(tmp_path, {"PATH": "/opt/a b:/bin", "HOME": "/root"})
    [handed] = (word for word in command if word.startswith("SetEnv="))
    assert shlex.split(handed.removeprefix("SetEnv=")) == ["PATH=/opt/a b:/bin"]
    assert Path(command[0]).is_absolute(), "sshd wants its own whole path"


def test_what_a_pod_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, keys = paper_engine(tmp_path / "e", tp=8, pp=2), tmp_path / "keys"
    keys.mkdir()
    for name, value in GROUP.items():
        monkeypatch.setenv(name, value)
    words = [str(engine), "--nodes", "2", "--ssh-keys", str(keys)]
    assert launcher.main(words) == 2
    assert f"{keys / 'id'} is not there" in capsys.readouterr().err
    for name in KEY_FILES:
        (keys / name).touch()
    assert launcher.main(words) == 2
    assert "there are 3 pods in the group; wanted --nodes 3" in capsys.readouterr().err
    for wrong in (["--worker"], ["--ssh-keys", str(keys), "--hostfile", "hosts"]):
        with pytest.raises(SystemExit):
            launcher.main([str(engine), *wrong])

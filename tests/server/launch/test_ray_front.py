"""`--ray`: what the process beside gunicorn is told, without Ray."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.launch import ray_front
from enginehouse.server.launch.process_settings import num_replicas
from enginehouse.server.launch.ray_front import RayFront


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_front, "find_spec", lambda name: object())
    monkeypatch.setattr(ray_front.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_front, "gpus_of_one", lambda engine, env: 0)
    monkeypatch.setattr(ray_front, "default_threads", lambda: 8)


def started(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> list[str]:
    """The command of what stands beside gunicorn."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: commands.append(command))
    front = RayFront.of({}, env)
    front.start({"ENGINEHOUSE_ENGINE": "/e", **env, **front.settings})
    assert num_replicas(front.settings) == 1, "which are not gunicorn's to start"
    [command] = commands
    return command


@pytest.mark.parametrize(
    ("text", "deployed", "num_cpus"), [("2", ["2", "2"], "4"), ("1-4", ["1", "4"], "2")]
)
def test_so_many_are_deployed_and_share_the_threads(
    text: str, deployed: list[str], num_cpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = started(monkeypatch, {"ENGINEHOUSE_REPLICAS": text})
    at = command.index("--deploy")
    assert command[at + 1 : at + 3] == deployed
    assert command[command.index("--num-cpus") + 1] == num_cpus


def test_those_that_are_deployed_already_have_a_key_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("k" * 64)
    env = {"ENGINEHOUSE_HOST_KEY_FILE": str(tmp_path / "key")}
    command = started(monkeypatch, env)
    assert (
        "--deploy" not in command and command[command.index("--key-file") + 1] == env.popitem()[1]
    )
    assert (tmp_path / "key").read_text() == "k" * 64


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "need a key that each node finds"),
        ({"RAY_ADDRESS": "auto", "ENGINEHOUSE_REPLICAS": "2"}, "need a key that each node finds"),
        (
            {"ENGINEHOUSE_REPLICAS": "4-2"},
            "'4-2'; wanted a number from 1 to 99, or two such as 1-4",
        ),
        ({"ENGINEHOUSE_REPLICAS": "0"}, "'0'; wanted a number from 1 to 99"),
        ({"ENGINEHOUSE_REPLICAS": "1-100"}, "wanted a number from 1 to 99"),
        ({"ENGINEHOUSE_REPLICAS": "two"}, "wanted a number from 1 to 99"),
    ],
)
def test_what_cannot_be_is_a_sentence(env: dict[str, Any], said: str) -> None:
    with pytest.raises(EnginehouseError, match=said):
        RayFront.of({}, env)


def test_a_range_is_for_ray_alone() -> None:
    assert num_replicas({}) == 1 and num_replicas({"ENGINEHOUSE_REPLICAS": "99"}) == 99
    with pytest.raises(EnginehouseError, match="=1-4: within a range Ray Serve scales; add --ray"):
        num_replicas({"ENGINEHOUSE_REPLICAS": "1-4"})


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_front, "find_spec", lambda name: None)
    with pytest.raises(EnginehouseError, match=r"install enginehouse\[ray\]"):
        RayFront.of({"ENGINEHOUSE_REPLICAS": "2"}, {})

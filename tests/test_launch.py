"""The commands that start a server on one GPU, one node and several nodes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT, EngineMaker

from enginehouse.runtime.config import Mapping
from enginehouse.runtime.engine import Engine, read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.server import start
from enginehouse.server.launch import host_flags
from enginehouse.server.start import plan_launch

GUNICORN = ["gunicorn", "-c", "conf.py", start.APP]
QUOTED = shlex.join(GUNICORN)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "PMI_RANK": "0"}


@pytest.fixture
def engine(make_engine: EngineMaker) -> Engine:
    return read_engine(make_engine())


def compiled(engine: Engine, tp: int, pp: int = 1) -> Engine:
    manifest = msgspec.structs.replace(engine.manifest, backend="tensorrt_llm")
    config = replace(engine.config, mapping=Mapping(tp, pp))
    return Engine(Path("/engines/e"), config, manifest)


def said(engine: Engine, env: dict[str, str], **choices: Any) -> str:
    return plan_launch(engine, env, gunicorn=GUNICORN, **choices).said


@pytest.mark.parametrize("tp", [1, 4])
def test_one_node_runs_gunicorn_and_leaves_the_variables_of_slurm_out(
    engine: Engine, tp: int
) -> None:
    env = {"PATH": "/bin", **SLURM}
    launch = plan_launch(compiled(engine, tp), env, gunicorn=GUNICORN, num_gpus=4)
    assert launch.command == GUNICORN
    assert launch.env == {"PATH": "/bin", "ENGINEHOUSE_ENGINE": "/engines/e"}
    assert launch.said == (
        "env -u PMI_RANK -u SLURM_JOB_ID -u SLURM_PROCID ENGINEHOUSE_ENGINE=/engines/e " + QUOTED
    )


def test_several_nodes_of_a_slurm_job_run_one_task_for_each_gpu(engine: Engine) -> None:
    line = said(compiled(engine, 8, 2), SLURM, nodes=2)
    assert line == (
        "env ENGINEHOUSE_ENGINE=/engines/e srun --mpi=pmix -N 2 --ntasks 16 --ntasks-per-node 8 "
        "trtllm-llmapi-launch " + QUOTED
    )


def test_several_nodes_without_slurm_run_under_mpirun(engine: Engine) -> None:
    env = {"NCCL_P2P_DISABLE": "1", "HOME": "/root", "OMPI_COMM_WORLD_RANK": "0"}
    line = said(compiled(engine, 8, 2), env, nodes=2, hostfile="hosts")
    assert line == (
        "env -u OMPI_COMM_WORLD_RANK ENGINEHOUSE_ENGINE=/engines/e mpirun -n 16 --map-by ppr:8:node"
        " --hostfile hosts -x ENGINEHOUSE_ENGINE -x NCCL_P2P_DISABLE trtllm-llmapi-launch " + QUOTED
    )


def test_one_node_can_be_started_by_mpirun_too(engine: Engine) -> None:
    line = said(compiled(engine, 4), {}, launcher="mpirun")
    assert "mpirun -n 4 --map-by ppr:4:node -x ENGINEHOUSE_ENGINE trtllm-llmapi-launch" in line


@pytest.mark.parametrize(
    ("tp", "choices", "message"),
    [
        (4, {"num_gpus": 2}, "runs on 4 GPUs and 2 are visible"),
        (8, {"nodes": 2}, "8 ranks cannot be laid on 2 nodes"),
        (8, {"nodes": 3}, "8 ranks cannot be laid on 3 nodes"),
        (16, {"nodes": 2, "launcher": "spawn"}, "wants --launcher mpirun or srun"),
        (None, {"nodes": 2}, "runs on the CPU backend"),
        (None, {"launcher": "srun"}, "runs on the CPU backend"),
    ],
)
def test_what_cannot_run_is_refused(
    engine: Engine, tp: int | None, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        said(compiled(engine, tp) if tp else engine, {}, **choices)


def test_the_script_prints_the_command_and_stops(engine: Engine) -> None:
    command = ["bash", "scripts/launch.sh", str(engine.path), "--dry-run"]
    env = {**os.environ, "VENV": "no-such-environment", "SLURM_JOB_ID": "7"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:4] == ["env", "-u", "SLURM_JOB_ID", f"ENGINEHOUSE_ENGINE={engine.path}"]
    assert words[-3:] == ["-c", str(ROOT / "configs" / "gunicorn.conf.py"), start.APP]


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_a_script_is_correct_shell(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)


def test_a_missing_engine_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start.main([str(tmp_path / "none"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("enginehouse-launch: ")


def test_the_environment_is_handed_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"DETERMINISTIC": "1", "DEVICE": "cuda", "TP_SIZE": "4", "START_S": "90"}
    for name, value in values.items():
        monkeypatch.setenv(f"ENGINEHOUSE_{name}", value)
    flags = ["--deterministic", "--device", "cuda", "--tp-size", "4", "--start-s", "90"]
    assert host_flags() == flags
    for name in values:
        monkeypatch.setenv(f"ENGINEHOUSE_{name}", "")
    assert host_flags() == []


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("DETERMINISTIC", "yes", "0 or 1"),
        ("DEVICE", "gpu", "auto, cpu or cuda"),
        ("TP_SIZE", "0", "a number of GPUs"),
        ("START_S", "--x", "a number of seconds"),
    ],
)
def test_a_setting_that_is_none_ends_the_server_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, wanted: str
) -> None:
    monkeypatch.setenv(f"ENGINEHOUSE_{name}", value)
    with pytest.raises(SystemExit, match=f"ENGINEHOUSE_{name}='{value}'; wanted {wanted}"):
        host_flags()

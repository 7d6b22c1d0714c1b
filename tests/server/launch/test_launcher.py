"""The commands that start a server on one GPU, one node and several nodes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from enginehouse.runtime.engine import read_manifest, write_manifest
from enginehouse.runtime.errors import EngineError, EnginehouseError
from enginehouse.server.launch import launcher
from enginehouse.server.launch.launcher import Served, plan_launch, read_served
from enginehouse.server.launch.process_settings import host_flags, log_level
from makers.engines import EngineMaker
from makers.paths import ROOT

GUNICORN = ["gunicorn", "-c", "conf.py", launcher.APP]
QUOTED = shlex.join(GUNICORN)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "PMI_RANK": "0"}


def compiled(num_ranks: int) -> Served:
    return Served(Path("/engines/e"), num_ranks)


def said(served: Served, env: dict[str, str], **choices: Any) -> str:
    return plan_launch(served, env, gunicorn=GUNICORN, **choices).said


@pytest.mark.parametrize("tp", [1, 4])
def test_one_node_runs_gunicorn_and_leaves_the_variables_of_slurm_out(tp: int) -> None:
    env = {"PATH": "/bin", **SLURM}
    launch = plan_launch(compiled(tp), env, gunicorn=GUNICORN, num_gpus=4)
    assert launch.command == GUNICORN
    assert launch.env == {"PATH": "/bin", "ENGINEHOUSE_ENGINE": "/engines/e"}
    assert launch.said == (
        "env -u PMI_RANK -u SLURM_JOB_ID -u SLURM_PROCID ENGINEHOUSE_ENGINE=/engines/e " + QUOTED
    )


def test_several_nodes_of_a_slurm_job_run_one_task_for_each_gpu() -> None:
    line = said(compiled(16), SLURM, nodes=2)
    assert line == (
        "env ENGINEHOUSE_ENGINE=/engines/e srun --mpi=pmix -N 2 --ntasks 16 --ntasks-per-node 8 "
        "trtllm-llmapi-launch " + QUOTED
    )


def test_several_nodes_without_slurm_run_under_mpirun() -> None:
    env = {"NCCL_P2P_DISABLE": "1", "HOME": "/root", "OMPI_COMM_WORLD_RANK": "0"}
    line = said(compiled(16), env, nodes=2, hostfile="hosts")
    assert line == (
        "env -u OMPI_COMM_WORLD_RANK ENGINEHOUSE_ENGINE=/engines/e mpirun -n 16 --map-by ppr:8:node"
        " --hostfile hosts -x ENGINEHOUSE_ENGINE -x NCCL_P2P_DISABLE trtllm-llmapi-launch " + QUOTED
    )


def test_root_may_run_mpirun() -> None:
    line = said(compiled(16), {}, nodes=2, as_root=True)
    allowed = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n 16 "
    assert allowed in line and "OMPI" not in line.partition("mpirun")[2]
    assert "OMPI" not in said(compiled(16), {}, nodes=2)
    assert "OMPI" not in said(compiled(16), SLURM, nodes=2, as_root=True)
    assert "OMPI" not in said(compiled(4), {}, as_root=True)


def test_one_node_can_be_started_by_mpirun_too() -> None:
    line = said(compiled(4), {}, launcher="mpirun")
    assert "mpirun -n 4 --map-by ppr:4:node -x ENGINEHOUSE_ENGINE trtllm-llmapi-launch" in line


@pytest.mark.parametrize(
    ("num_ranks", "choices", "message"),
    [
        (4, {"num_gpus": 2}, "runs on 4 GPUs and 2 are visible"),
        (8, {"nodes": 2}, "8 ranks of .engines.e cannot be laid on 2 nodes"),
        (8, {"nodes": 3}, "8 ranks of .engines.e cannot be laid on 3 nodes"),
        (16, {"nodes": 2, "launcher": "spawn"}, "wants --launcher mpirun or srun"),
        (0, {"nodes": 2}, "runs on the CPU backend"),
        (0, {"launcher": "srun"}, "runs on the CPU backend"),
        (4, {"hostfile": "hosts"}, "--hostfile is mpirun's, and spawn starts the ranks"),
        (16, {"nodes": 2, "launcher": "srun", "hostfile": "hosts"}, "and srun starts the ranks"),
    ],
)
def test_what_cannot_run_is_refused(num_ranks: int, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        said(compiled(num_ranks), {}, **choices)


def test_the_ranks_are_the_engines_or_the_checkpoints_tp_size(
    make_engine: EngineMaker, tmp_path: Path
) -> None:
    engine = make_engine()
    assert read_served(engine, {"ENGINEHOUSE_TP_SIZE": "4"}) == (engine, 0, 0)
    manifest = msgspec.structs.replace(read_manifest(engine), backend="tensorrt_llm")
    shutil.copytree(engine, tmp_path / "compiled")
    shutil.copy(engine / "rank0.safetensors", tmp_path / "compiled" / "rank0.engine")
    files = {**manifest.files, "rank0.engine": manifest.files["rank0.safetensors"]}
    write_manifest(tmp_path / "compiled", msgspec.structs.replace(manifest, files=files))
    assert read_served(tmp_path / "compiled", {}).num_ranks == 1
    checkpoint = make_engine(quant="fp8", format="hf")
    assert read_served(checkpoint, {}).num_ranks == 1
    assert read_served(checkpoint, {"ENGINEHOUSE_TP_SIZE": "4"}).num_ranks == 4
    with pytest.raises(EngineError, match="ENGINEHOUSE_TP_SIZE='two'; wanted a number of GPUs"):
        read_served(checkpoint, {"ENGINEHOUSE_TP_SIZE": "two"})


def test_the_script_prints_the_command_and_stops(make_engine: EngineMaker) -> None:
    engine = make_engine()
    command = ["bash", "scripts/launch.sh", str(engine), "--dry-run"]
    env = {**os.environ, "VENV": "no-such-environment", "SLURM_JOB_ID": "7"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:4] == ["env", "-u", "SLURM_JOB_ID", f"ENGINEHOUSE_ENGINE={engine}"]
    assert words[-3:] == ["-c", str(ROOT / "configs" / "gunicorn.conf.py"), launcher.APP]
    own = str(ROOT / "setup.cfg")  # any file
    done = subprocess.run(
        [*command, "--config", own], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert shlex.split(done.stdout)[-3:] == ["-c", own, launcher.APP]


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("tests/doubles/*.sh")]),
    ids=lambda path: path.name,
)
def test_a_script_is_correct_shell(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)


def test_a_missing_engine_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main([str(tmp_path / "none"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("enginehouse-launch: ")


def test_the_environment_is_handed_to_the_host() -> None:
    values = {
        "DETERMINISTIC": "1",
        "MAX_SEQ_LEN": "4096",
        "MAX_BATCH_SIZE": "9",
        "MAX_NUM_TOKENS": "64",
        "KV_CACHE_GIB": "0.5",
        "SPECULATIVE": "ngram",
        "NUM_SPECULATIVE_TOKENS": "7",
        "MAX_MATCHING_NGRAM_SIZE": "2",
        "SPECULATIVE_BATCH_SIZE": "3",
        "DEVICE": "cuda",
        "TP_SIZE": "4",
        "RANKS_ADDRESS": "0.0.0.0:5600",
        "LOCAL_RANKS": "4",
        "START_S": "90",
        "GRAMMARS_AT_ONCE": "0",
        "GRAMMAR_TIMEOUT_S": "5",
        "LOG_LEVEL": "warning",
        "LOG_FORMAT": "json",
        "ACCESS_LOG": "1",
    }
    flags = ["--deterministic", "--grammars-later", "--max-seq-len", "4096"]
    flags += ["--max-batch-size", "9"]
    flags += ["--max-num-tokens", "64", "--kv-cache-gib", "0.5"]
    flags += ["--speculative", "ngram", "--num-speculative-tokens", "7"]
    flags += ["--max-matching-ngram-size", "2", "--speculative-batch-size", "3"]
    flags += ["--device", "cuda", "--tp-size", "4", "--ranks-address", "0.0.0.0:5600"]
    flags += ["--local-ranks", "4", "--start-s", "90", "--grammar-timeout-s", "5"]
    flags += ["--log-level", "warning", "--log-format", "json", "--log-traffic"]
    assert host_flags({f"ENGINEHOUSE_{name}": text for name, text in values.items()}) == flags
    assert host_flags(dict.fromkeys((f"ENGINEHOUSE_{name}" for name in values), "")) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_requests_are_logged_where_they_are_asked_for_or_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert host_flags({}) == ["--log-traffic"] * terminal
    assert host_flags({"ENGINEHOUSE_ACCESS_LOG": "1"}) == ["--log-traffic"]
    assert host_flags({"ENGINEHOUSE_ACCESS_LOG": "0"}) == []


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("DETERMINISTIC", "yes", "0 or 1"),
        ("MAX_SEQ_LEN", "0", "a number of tokens"),
        ("MAX_BATCH_SIZE", "-1", "a number of sequences"),
        ("MAX_NUM_TOKENS", "1e3", "a number of tokens"),
        ("KV_CACHE_GIB", "0.0", "GiB, like 4 or 0.5"),
        ("KV_CACHE_GIB", "4GiB", "GiB, like 4 or 0.5"),
        ("SPECULATIVE", "eagle", "ngram or off"),
        ("NUM_SPECULATIVE_TOKENS", "0", "a number of tokens from 1 to 99"),
        ("MAX_MATCHING_NGRAM_SIZE", "10", "a number of tokens from 1 to 9"),
        ("SPECULATIVE_BATCH_SIZE", "0", "a number of sequences"),
        ("DEVICE", "gpu", "auto, cpu or cuda"),
        ("TP_SIZE", "0", "a number of GPUs"),
        ("START_S", "--x", "a number of seconds"),
        ("RANKS_ADDRESS", "here", "HOST:PORT"),
        ("GRAMMARS_AT_ONCE", "later", "0 or 1"),
        ("LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("LOG_FORMAT", "xml", "text or json"),
        ("ACCESS_LOG", "yes", "0 or 1"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_its_name(name: str, value: str, wanted: str) -> None:
    with pytest.raises(EnginehouseError, match=f"ENGINEHOUSE_{name}='{value}'; wanted {wanted}"):
        host_flags({f"ENGINEHOUSE_{name}": value})


def test_every_process_logs_from_info_on_unless_told_otherwise() -> None:
    assert [log_level({}), log_level({"ENGINEHOUSE_LOG_LEVEL": "error"})] == ["info", "error"]

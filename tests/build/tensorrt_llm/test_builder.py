"""From checkpoint to TensorRT-LLM engine: what is run, kept, checked and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from doubles import trtllm_builder
from enginehouse.build import cli
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.tensorrt_llm import compile as trtllm_compile
from enginehouse.build.tensorrt_llm.builder import builder_machine
from enginehouse.build.tensorrt_llm.kept_checkpoint import checkpoint_path, open_compilable
from enginehouse.build.tensorrt_llm.smoke import MAX_GAP, greedy_answer, judge, refuse_garbage
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import Engine, read_engine, verify_files
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.machine.gpus import Gpu
from makers.engines import EngineMaker, build_engine, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--max-batch-size", "4", "--quiet"]
FP8 = {"quant": "fp8", "kv_cache_dtype": "fp8"}


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scripted trtllm-build, and engines that answer as their checkpoint does."""
    (tmp_path / "bin").mkdir()
    program = trtllm_builder.install(tmp_path / "bin")
    monkeypatch.setenv("ENGINEHOUSE_TRTLLM_BUILD", str(program))
    monkeypatch.setattr(trtllm_compile, "open_executor", open_beside)
    return program


def open_beside(directory: Path) -> Any:
    """The CPU executor of the checkpoint that a half-made engine belongs to."""
    assert read_engine(directory).manifest.backend == "tensorrt_llm"
    folders = list(directory.parents)[:2]  # an engine that is in its place has it beside itself
    [checkpoint] = (path for folder in folders for path in folder.glob("*.checkpoint"))
    return open_executor(checkpoint)


def gpus(count: int, sm: int) -> list[Gpu]:
    return [
        Gpu(number, f"GPU-{number}", "card", sm, 80000, 79000, "580") for number in range(count)
    ]


def build(source: SourceCheckpoint, output: Path, **settings: Any) -> Engine:
    values = {"backend": "tensorrt_llm", "max_num_tokens": None, **settings}
    return read_engine(build_engine(source, output, **values))


def test_an_engine_directory_is_whole_and_says_where_it_is_from(
    builder: Path, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    engine = build(tiny_source, tmp_path / "e", tp=2)
    verify_files(engine)
    checkpoint = read_engine(tmp_path / "e.checkpoint")
    verify_files(checkpoint)
    names = {path.name for path in engine.path.iterdir()}
    assert names >= {"rank0.engine", "rank1.engine", "config.json", "tokenizer.json"}
    assert names == {*engine.manifest.files, "manifest.json"} and "model.cache" not in names
    manifest = engine.manifest
    assert manifest.backend == "tensorrt_llm" and manifest.choices["tp"] == 2
    assert manifest.machine is not None and manifest.machine["tensorrt_llm"] == "1.2.1"
    assert manifest.source["checkpoint"] == checkpoint.manifest.digest
    assert manifest.limits.max_num_tokens == 8192
    rebuild = f"enginehouse-build compile {checkpoint.path} -o {engine.path}"
    assert manifest.source["rebuild"] == rebuild
    assert manifest.verify is not None and 0 <= manifest.verify["max_gap"] < 0.1
    log = (tmp_path / "e.trtllm-build.log").read_text()
    assert "Build phase of rank 1 done" in log and log.startswith("$ ")


def test_every_flag_reaches_the_program(
    builder: Path, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    asked = {"multiple_profiles": True, "monitor-memory": True, "max_beam_width": 2}
    engine = build(tiny_source, tmp_path / "e", tp=2, workers=2, trtllm_build=asked)
    command = engine.manifest.source["command"]
    assert command.startswith(f"{builder} --checkpoint_dir {tmp_path}/e.checkpoint --output_dir ")
    for words in (
        "--max_seq_len 2048 --max_input_len 2048 --max_batch_size 8 --max_num_tokens 8192",
        "--multiple_profiles enable",
        "--max_beam_width 2",
        "--workers 2",
    ):
        assert words in command
    assert "--monitor_memory --" in command or command.endswith("--monitor_memory")


def test_without_fp8_attention_the_build_is_tried_once_more(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", "fmha")
    engine = build(tiny_source, tmp_path / "e", **FP8)
    assert engine.manifest.source["fp8_context_fmha"] is False
    log = (tmp_path / "e.trtllm-build.log").read_text()
    assert log.count("\n$ ") == 1, "two runs, in one log"
    assert (engine.path / "rank0.engine").read_bytes() == b"engine of rank 0"


def test_a_retry_is_announced(
    builder: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", "fmha")
    flags = ["--backend", "tensorrt_llm", "--quant", "fp8", "--kv-cache-dtype", "fp8"]
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "e"), *flags]) == 0
    said = capsys.readouterr()
    assert "no kernel for use_fp8_context_fmha here; once more without it" in said.err
    assert "Build phase of rank 0 done" in said.err, "the program's lines are shown"
    assert "(built, sha256:" in said.out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("broken", "status 1: .TRT. .E. Error Code 2: something else; see .*e.trtllm-build.log"),
        ("killed", "was killed, as it is when memory runs out"),
        ("rank missing", "wrote no rank1.engine"),
        ("smaller", "made an engine of max_batch_size=7; wanted 8"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_the_checkpoint(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    message: str,
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", how)
    with pytest.raises(EngineError, match=message):
        build(tiny_source, tmp_path / "e", tp=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "bin",
        "e.checkpoint",
        "e.trtllm-build.log",
    }


def test_no_retry_where_it_could_not_help(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", "broken")
    with pytest.raises(EngineError, match="something else"):
        build(tiny_source, tmp_path / "e", **FP8)
    assert (tmp_path / "e.trtllm-build.log").read_text().count("$ ") == 1


def test_the_same_command_again_compiles_what_was_converted(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", "broken")
    with pytest.raises(EngineError):
        build(tiny_source, tmp_path / "e")
    rank = tmp_path / "e.checkpoint" / "rank0.safetensors"
    converted = rank.stat()
    monkeypatch.delenv("TRTLLM_BUILDER")
    engine = build(tiny_source, tmp_path / "e", max_batch_size=3)
    assert rank.stat().st_ino == converted.st_ino, "the checkpoint was made again"
    assert engine.manifest.limits.max_batch_size == 3
    assert "--max_batch_size 3" in engine.manifest.source["command"]
    made = (engine.path / "manifest.json").read_text()
    again = build(tiny_source, tmp_path / "e", max_batch_size=3)
    assert (again.path / "manifest.json").read_text() == made, "it was up to date"


def test_a_checkpoint_is_compiled_on_another_machine(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--backend", "tensorrt_llm", *SMALL]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([*flags, "--quant", "int4", "--tp", "2"]) == 3
    command = capsys.readouterr().out.splitlines()[-3].split()
    assert command[:2] == ["enginehouse-build", "compile"]
    assert cli.main(command[1:]) == 2
    assert "trtllm-build is not on PATH" in capsys.readouterr().err
    trtllm_builder.install(tmp_path)
    monkeypatch.setattr(trtllm_compile, "open_executor", open_beside)
    assert cli.main([*command[1:], "--quiet"]) == 0
    engine = read_engine(tmp_path / "e")
    assert engine.manifest.verify is not None and engine.config.quantization.quant_algo
    capsys.readouterr()
    assert cli.main(["compile", str(tmp_path / "e"), "-o", str(tmp_path / "f")]) == 2
    assert "is no checkpoint for TensorRT-LLM" in capsys.readouterr().err


def test_the_checkpoint_itself_is_not_written_over(
    builder: Path, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    build(tiny_source, tmp_path / "e", tp=2)
    before = read_engine(checkpoint_path(tmp_path / "e")).manifest
    source = open_trtllm_checkpoint(checkpoint_path(tmp_path / "e"))
    with pytest.raises(PlanError, match="e.checkpoint is the source itself; `enginehouse-build c"):
        build(source, tmp_path / "e", tp=1)
    assert read_engine(checkpoint_path(tmp_path / "e")).manifest == before


def open_trtllm_checkpoint(path: Path) -> SourceCheckpoint:
    from enginehouse.build.sources.trtllm_checkpoint import open_trtllm

    return open_trtllm(path)


@pytest.mark.parametrize(
    ("version", "cards", "settings", "message"),
    [
        ("1.3.0", [], {}, "trtllm-build is TensorRT-LLM 1.3.0's; .* install tensorrt-llm==1.2.1"),
        ("1.2.1", gpus(1, 80), FP8, "does not run on this machine's SM80: FP8 products need SM89"),
        ("1.2.1", gpus(1, 90), {"tp": 2}, "1 of the 2 GPUs that this engine runs on are visible"),
        (
            "1.2.1",
            gpus(1, 120),
            {"quant": "int4", "until": "compile"},
            "quant=int4 on SM120 answers wrongly .* leave --until compile out",
        ),
        ("1.2.1", gpus(1, 100), {"quant": "fp8_rowwise"}, "row-wise kernel is for SM89 and SM90"),
    ],
)
def test_what_this_machine_cannot_compile_is_refused_before_conversion(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cards: list[Gpu],
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(
        trtllm_compile, "builder_machine", lambda program: {"tensorrt_llm": version}
    )
    monkeypatch.setattr(trtllm_compile, "visible_gpus", lambda: cards)
    with pytest.raises(PlanError, match=message):
        build(tiny_source, tmp_path / "e", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_one_gpu_compiles_all_ranks_when_the_answer_is_not_checked(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trtllm_compile, "visible_gpus", lambda: gpus(1, 90))
    engine = build(tiny_source, tmp_path / "e", tp=4, until="compile")
    assert engine.manifest.verify is None and len(list(engine.path.glob("*.engine"))) == 4


def test_versions_are_those_of_the_programs_own_python(builder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, version in (("tensorrt_llm", "1.2.1"), ("tensorrt", "10.14.1.48")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    program = tmp_path / "elsewhere"
    program.write_text(f"#!{python} -s\n")
    machine = builder_machine(str(program))
    assert (machine["tensorrt_llm"], machine["tensorrt"]) == ("1.2.1", "10.14.1.48")


def test_ranks_of_slurm_do_not_reach_the_program(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    build(tiny_source, tmp_path / "e")
    log = (tmp_path / "e.trtllm-build.log").read_text()
    assert "ranks known from outside: []" in log


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def worker_of(log: Path) -> int:
    return int(log.read_text().partition("worker ")[2].split()[0])


def test_an_interruption_ends_the_program_and_its_workers(
    builder: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--backend", "tensorrt_llm"]
    command = [sys.executable, "-m", "enginehouse.build.cli", *flags, *SMALL]
    code = f"import sys; from enginehouse.build.cli import main; sys.exit(main({command[3:]!r}))"
    env = {**os.environ, "TRTLLM_BUILDER": "hang"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "e.trtllm-build.log"
    wait_for(lambda: log.exists() and "worker " in log.read_text())
    worker = worker_of(log)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "e.checkpoint is whole: the same command compiles it again" in said
    wait_for(lambda: gone(worker))
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "e.checkpoint", log.name}


def test_a_worker_that_the_program_leaves_is_ended(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRTLLM_BUILDER", "leaves a worker")
    build(tiny_source, tmp_path / "e")
    wait_for(lambda: gone(worker_of(tmp_path / "e.trtllm-build.log")))


def test_an_engine_that_answers_as_another_model_is_not_kept(
    builder: Path,
    sample_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with weights in a wrong layout: the engine loads, and talks nonsense."""

    def nonsense(directory: Path) -> Any:
        executor = open_beside(directory)
        executor.runner.model.layers.reverse()
        return executor

    monkeypatch.setattr(trtllm_compile, "open_executor", nonsense)
    with pytest.raises(EngineError, match="nats below the CPU backend's choice"):
        build(sample_source, tmp_path / "e", quant="none", max_seq_len=256)
    assert not (tmp_path / "e").exists()


def test_an_engine_that_cannot_be_checked_now_is_kept_and_checked_later(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(directory: Path) -> Any:
        raise EngineError("another process holds the GPU's memory")

    monkeypatch.setattr(trtllm_compile, "open_executor", busy)
    with pytest.raises(
        EngineError, match="compiled, and the same command checks its answer, which"
    ):
        build(tiny_source, tmp_path / "e")
    compiled = read_engine(tmp_path / "e").manifest
    assert compiled.verify is None
    monkeypatch.setattr(trtllm_compile, "open_executor", open_beside)
    monkeypatch.setenv("TRTLLM_BUILDER", "broken")
    checked = build(tiny_source, tmp_path / "e").manifest
    assert checked.verify is not None and checked.digest == compiled.digest
    assert checked.created == compiled.created, "it was compiled again"


def test_an_interruption_of_the_check_keeps_what_was_compiled(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(directory: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trtllm_compile, "open_executor", interrupted)
    for _ in range(2):  # of a new engine, and of one that is in its place already
        with pytest.raises(KeyboardInterrupt, match="e is compiled, and the same command checks"):
            build(tiny_source, tmp_path / "e")
        verify_files(read_engine(tmp_path / "e"))
        monkeypatch.setenv("TRTLLM_BUILDER", "broken")


def test_where_only_the_answer_can_tell_nothing_unchecked_is_kept(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(directory: Path) -> Any:
        raise EngineError("another process holds the GPU's memory")

    machine = {"tensorrt_llm": "1.2.1", "tensorrt": None, "sm": "120"}
    monkeypatch.setattr(trtllm_compile, "builder_machine", lambda program: machine)
    monkeypatch.setattr(trtllm_compile, "open_executor", busy)
    with pytest.raises(EngineError, match="^another process holds"):
        build(tiny_source, tmp_path / "e", quant="int4")
    assert not (tmp_path / "e").exists()


def test_memory_that_the_check_needs_is_counted_first(
    builder: Path,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(trtllm_compile.psutil, "virtual_memory", lambda: little)
    with pytest.raises(EngineError, match="MiB of memory to judge it and 1 MiB are free"):
        build(tiny_source, tmp_path / "e")


def test_an_engine_of_other_arithmetic_is_accepted(
    sample_source: SourceCheckpoint, tmp_path: Path
) -> None:
    """float32 against bfloat16 stands for a GPU's kernels: tokens may differ, the sense not."""
    output = build_engine(
        sample_source, tmp_path / "e", max_seq_len=256, until="compile", compute_dtype="bfloat16"
    )
    other = read_engine(output)
    executor = open_executor(output)
    prompt, answer = greedy_answer(executor, other)
    executor.close()
    limits = msgspec.structs.replace(other.manifest.limits, compute_dtype="float32")
    manifest = msgspec.structs.replace(other.manifest, limits=limits)
    figures = judge(Engine(other.path, other.config, manifest), prompt, answer)
    assert 0 <= figures.max_gap < MAX_GAP / 4 and figures.num_tokens == 24
    refuse_garbage(figures)


def test_an_answer_of_nan_is_refused(sample_source: SourceCheckpoint) -> None:
    from enginehouse.build.tensorrt_llm.smoke import SmokeFigures

    with pytest.raises(EngineError, match="nan nats below"):
        refuse_garbage(SmokeFigures("?", "!", 1, 0.0, float("nan")))


def test_a_changed_checkpoint_is_not_compiled(
    builder: Path, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    build(tiny_source, tmp_path / "e")
    rank = tmp_path / "e.checkpoint" / "rank0.safetensors"
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)
    with pytest.raises(EngineError, match="rank0.safetensors: its SHA-256 is not"):
        open_compilable(rank.parent)


def test_an_engine_for_the_cpu_is_no_checkpoint_to_compile(make_engine: EngineMaker) -> None:
    with pytest.raises(EngineError, match="is no checkpoint for TensorRT-LLM; make one with"):
        open_compilable(make_engine())


def test_a_new_source_is_converted_again(builder: Path, tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        write_tiny_checkpoint(tmp_path / "m", seed=seed)
        engine = build(open_checkpoint(tmp_path / "m"), tmp_path / "e")
        digests.append(json.dumps(engine.manifest.source["checkpoint"]))
    assert digests[0] != digests[1]

"""A TensorRT-LLM checkpoint becomes rank engines: `trtllm-build`, run as a child process.

The checkpoint's own manifest holds every choice, so this needs no source: what was converted on
one machine is compiled on another. Knows no tensor.
Source: TensorRT-LLM 1.2.1, trtllm-build; NVIDIA/TensorRT-LLM issues 4217, 1864, 9298, 8308, 743.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from enginehouse.build.forms.capabilities import lays_out_wrongly, refusal
from enginehouse.build.plan.trtllm_flags import command_words, facts_of, serving_flags
from enginehouse.build.progress import BuildProgress
from enginehouse.build.sources.tokenizer_files import copy_tokenizer
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import Engine, Manifest, engine_digest, hash_files
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.machine.binding import record_machine
from enginehouse.runtime.machine.gpus import Gpu
from enginehouse.runtime.machine.mpi_environment import without_ranks

TENSORRT_LLM = "1.2.1"  # the last stable release that compiles and loads engines
PROGRAM = "ENGINEHOUSE_TRTLLM_BUILD"
_FP8_ATTENTION = "use_fp8_context_fmha"
# TensorRT-LLM also logs each flag it sets, this one too: only a complaint counts.
_FMHA_COMPLAINT = re.compile(
    r"(?!.*\bSet \w+ to\b)(?=.*fmha)(?=.*(assert|error|unsupport|cannot|not found))", re.I
)
_TAIL_LINES = 400
_TERMINATE_S = 10.0
_VERSIONS = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("tensorrt_llm", "tensorrt"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def find_builder(env: Mapping[str, str] = os.environ) -> str | None:
    """The path of trtllm-build: ENGINEHOUSE_TRTLLM_BUILD's, beside this interpreter, or on PATH."""
    given = env.get(PROGRAM)
    if given:
        program = shutil.which(given)
        if program is None:
            raise PlanError(f"{PROGRAM}={given} is no program; give the path of trtllm-build")
        return program
    beside = Path(sys.executable).with_name("trtllm-build")
    return str(beside) if beside.exists() else shutil.which("trtllm-build", path=env.get("PATH"))


def builder_machine(program: str) -> dict[str, str | None]:
    """What an engine compiled here is bound to; the versions are those of the program's Python,
    which may be another environment than ours.
    """
    found: dict[str, str | None] = record_machine()
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        with open(program, "rb") as file:
            line = file.readline(4096).decode()
        if line.startswith("#!"):
            command = [*shlex.split(line[2:]), "-c", _VERSIONS]
            env = without_ranks(os.environ)
            done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=env)
            found |= json.loads(done.stdout)
    return found


def check_builder(
    quant: str,
    config: ModelConfig,
    machine: Mapping[str, str | None],
    gpus: Sequence[Gpu],
    checked: bool,
) -> None:
    """PlanError, before a weight is read, when this machine cannot compile or check the engine.

    checked: whether the engine's answer will be compared with the CPU backend's. What is not
    known of the machine (no nvidia-smi) is not refused.
    """
    version = machine.get("tensorrt_llm")
    if version is not None and version.partition("+")[0] != TENSORRT_LLM:
        raise PlanError(
            f"trtllm-build is TensorRT-LLM {version}'s; the checkpoint and its flags are for "
            f"{TENSORRT_LLM}: install tensorrt-llm=={TENSORRT_LLM} (docs/migrating.md says why)"
        )
    kv_cache_dtype = facts_of(quant, None, config).kv_cache_dtype
    kinds = {gpu.sm for gpu in gpus} or {int(sm) for sm in [machine.get("sm")] if sm}
    for sm in sorted(kinds):
        wrong = lays_out_wrongly(quant, sm)
        reason = None if wrong else refusal(quant, sm, kv_cache_dtype)
        if reason is not None:
            raise PlanError(
                f"quant={quant} with kv_cache_dtype={kv_cache_dtype} does not run on "
                f"this machine's SM{sm}: {reason}; choose another quant, or the GPUs with "
                "CUDA_VISIBLE_DEVICES"
            )
        if wrong and not checked:
            raise PlanError(
                f"quant={quant} on SM{sm} answers wrongly with some releases of TensorRT-LLM, so "
                "its answer must be checked; leave --until compile out"
            )
    world_size = config.mapping.world_size
    if gpus and checked and len(gpus) < world_size:
        raise PlanError(
            f"{len(gpus)} of the {world_size} GPUs that this engine runs on are visible; make "
            "them visible, or build without the check of its answer: --until compile"
        )


def builder_flags(choices: Mapping[str, Any], config: ModelConfig) -> dict[str, str]:
    """Every flag but the two directories and workers, from a build's settled choices."""
    facts = facts_of(choices["quant"], choices["gpu"], config)
    limits = ("max_seq_len", "max_batch_size", "max_num_tokens", "kv_block_size")
    asked: dict[str, str] = choices["trtllm_build"]
    return serving_flags(facts, *(choices[name] for name in limits)) | asked


def trtllm_build_command(
    flags: Mapping[str, str],
    checkpoint_dir: Path,
    engine_dir: Path,
    *,
    workers: int = 1,
    program: str = "trtllm-build",
) -> list[str]:
    """The command that compiles every rank of a checkpoint."""
    words = [program, "--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(engine_dir)]
    return [*words, *command_words(flags), "--workers", str(workers)]


class BuilderRun(NamedTuple):
    """How trtllm-build ended, its last lines, and the most memory it had, bytes, all processes."""

    status: int
    tail: list[str]
    peak_memory_bytes: int


def run_builder(
    command: Sequence[str], log: Path, cwd: Path, say: Callable[[str], None]
) -> BuilderRun:
    """Run trtllm-build in a process group of its own, each line to `log` and to `say`.

    Whatever ends this function, the whole group has ended before: a rank's builder that stays
    behind would hold the GPU's memory, and the pipe.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    peak = 0
    env = without_ranks(os.environ)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env=env,
            text=True,
            errors="replace",
        ) as process,
    ):
        file.write(f"$ {shlex.join(command)}\n")
        leader = threading.Thread(target=_end_after_leader, args=(process,), daemon=True)
        leader.start()
        try:
            assert process.stdout is not None, "it was opened as a pipe"
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                say(line.rstrip())
                peak = max(peak, _memory_bytes(process.pid))
            leader.join()
        finally:
            end_group(process)
    return BuilderRun(process.returncode, list(tail), peak)


def _end_after_leader(process: subprocess.Popen[str]) -> None:
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_group(process: subprocess.Popen[str]) -> None:
    """Terminate the process group that `process` leads, and kill what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _memory_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants."""
    total = 0
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def compile_engine(
    checkpoint: Engine,
    directory: Path,
    output: Path,
    program: str,
    machine: dict[str, str | None],
    workers: int,
    progress: BuildProgress,
) -> Manifest:
    """Compile a checkpoint's ranks into an empty `directory`; its manifest, not yet written.

    output: where the directory will be put; the log is kept beside it. One failure is known to
    go away when FP8 attention over the prompt is left off: then that is tried once, and said.
    Raises EngineError, naming the log, for any other.
    """
    flags = builder_flags(checkpoint.manifest.choices, checkpoint.config)
    log = log_path(output)
    log.unlink(missing_ok=True)
    with progress.stage("compile") as stage:
        while True:
            command = trtllm_build_command(
                flags, checkpoint.path, directory, workers=workers, program=program
            )
            run = run_builder(command, log, directory, progress.note)
            if run.status == 0 or not _helped_by_retry(flags, run):
                break
            progress.note(f"no kernel for {_FP8_ATTENTION} here; once more without it")
            flags[_FP8_ATTENTION] = "disable"
            shutil.rmtree(directory)
            directory.mkdir()
        if run.status != 0:
            raise EngineError(_failure(run, log))
        version = _check_result(checkpoint, directory, log)
        (directory / "model.cache").unlink(missing_ok=True)  # of timings, which nothing reads
        copy_tokenizer(checkpoint.path, directory)
        manifest = _manifest(checkpoint, directory, output, command, flags)
        machine = {**machine, "tensorrt_llm": version or machine.get("tensorrt_llm")}
        stage.finish(
            f"{checkpoint.config.mapping.world_size} rank engine(s), {manifest.digest[:19]}; at "
            f"most {run.peak_memory_bytes / 2**30:.1f} GiB of memory; log: {log}"
        )
    return msgspec.structs.replace(manifest, machine=machine)


def log_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.trtllm-build.log")


def _helped_by_retry(flags: Mapping[str, str], run: BuilderRun) -> bool:
    complained = any(_FMHA_COMPLAINT.match(line) for line in run.tail)
    return flags[_FP8_ATTENTION] == "enable" and complained


def _failure(run: BuilderRun, log: Path) -> str:
    """One sentence on why there is no engine."""
    gib = f"{run.peak_memory_bytes / 2**30:.1f} GiB"
    if run.status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            f"trtllm-build was killed, as it is when memory runs out ({gib} were in use); build "
            f"with --workers 1, or on a machine with more memory: see {log}"
        )
    last = next((line for line in reversed(run.tail) if "error" in line.lower()), "")
    last = last or (run.tail[-1] if run.tail else "it said nothing")
    return f"trtllm-build ended with status {run.status}: {last.strip()[:300]}; see {log}"


def _check_result(checkpoint: Engine, directory: Path, log: Path) -> str | None:
    """The version that compiled it; EngineError unless the engine is whole and of these limits."""
    world_size = checkpoint.config.mapping.world_size
    missing = [f"rank{r}.engine" for r in range(world_size)]
    missing = [name for name in missing if not (directory / name).is_file()]
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        limits = config["build_config"]
        mapping = config["pretrained_config"]["mapping"]
    except (OSError, ValueError, KeyError, TypeError):
        missing.append("config.json with pretrained_config and build_config")
    if missing:
        raise EngineError(f"trtllm-build ended well but wrote no {missing[0]}; see {log}")
    if mapping.get("world_size", world_size) != world_size:
        raise EngineError(
            f"trtllm-build wrote an engine for {mapping['world_size']} GPUs; wanted {world_size}: "
            f"see {log}"
        )
    for name in ("max_seq_len", "max_batch_size", "max_num_tokens"):
        wanted = getattr(checkpoint.manifest.limits, name)
        if limits.get(name) is not None and limits[name] < wanted:
            raise EngineError(
                f"trtllm-build made an engine of {name}={limits[name]}; wanted {wanted}: see {log}"
            )
    version = config.get("version")
    return version if isinstance(version, str) else None


def _manifest(
    checkpoint: Engine,
    directory: Path,
    output: Path,
    command: Sequence[str],
    flags: Mapping[str, str],
) -> Manifest:
    files = hash_files(directory, [path.name for path in directory.iterdir() if path.is_file()])
    rebuild = ["enginehouse-build", "compile", str(checkpoint.path), "-o", str(output)]
    origin = {
        "checkpoint": checkpoint.manifest.digest,
        "command": shlex.join(command),
        "fp8_context_fmha": flags[_FP8_ATTENTION] == "enable",
        "rebuild": shlex.join(rebuild),
    }
    return msgspec.structs.replace(
        checkpoint.manifest,
        name=output.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        backend="tensorrt_llm",
        source=checkpoint.manifest.source | origin,
        files=files,
        digest=engine_digest(files),
    )

"""The plans of an engine, each compiled in a process of its own, as many at once as fit.

Knows which files an engine has; what is in one is `compile.py`'s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.forms.capabilities import GPU_SM, tensorrt_package
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.footprint import GIB, GPU_MEMORY_GIB, kv_bytes_per_token
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.build.tensorrt.compile import PlanLimits, plan_limits
from enginehouse.build.tensorrt.compiler import check_compiler
from enginehouse.build.tensorrt.parts import PlanPart, cut_decoder
from enginehouse.build.tensorrt.worker import STEPS, Job
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError, PlanError

# Of a compiling process, as measured (docs/tensorrt.md): by itself, for a layer, and for each
# byte of weights that becomes part of the plan.
_BASE_BYTES, _LAYER_BYTES, _BAKED = 400 << 20, 25 << 20, 4


def write_plans(plan: BuildPlan, directory: Path, progress: BuildProgress) -> dict[str, Any]:
    """Put the plans into an engine's folder; what its manifest says of them.

    directory: holds the rank files, which are read for baked weights only.
    """
    trt = check_compiler(plan.package, plan.targets)
    settings = plan.settings
    cached = cached_tokens(plan.config, plan.targets)
    classes = plan_limits(plan.max_seq_len, settings.max_batch_size, plan.max_num_tokens, cached)
    cut = settings.plan_layers, settings.bake_weights
    jobs, plans = plan_jobs(plan.config, plan.targets, classes, directory, *cut)
    started_s = time.monotonic()
    with progress.stage("compile", len(jobs) * STEPS, "steps") as stage:
        at_once = jobs_at_once(list(jobs.values()), psutil.virtual_memory().available)
        files = compile_jobs(jobs, at_once, stage.advance)
        most = mib(max(file["peak_memory_bytes"] for file in files.values()))
        sizes = mib(sum(file["bytes"] for file in files.values()))
        targets = ", ".join(f"SM{sm}" for sm in plan.targets)
        many = f"{len(files)} TensorRT plan{'s' * (len(files) > 1)} for {targets}, {sizes}"
        scratch = mib(max(max(file["scratch_bytes"], default=0) for file in files.values()))
        costs = f"{at_once} at once, at most {most} of memory each"
        stage.finish(f"{many}; {costs}; scratch memory on a GPU: {scratch}")
    for each in plans:
        each.update(_costs(each, files))
    return {
        "package": plan.package,
        "version": str(trt.__version__),
        "targets": plan.targets,
        "weights": "constants" if settings.bake_weights else "inputs",
        "seconds": round(time.monotonic() - started_s, 1),
        "plans": plans,
        "files": files,
    }


def cached_tokens(config: ModelConfig, sms: Sequence[int]) -> int:
    """How many tokens' keys and values the largest GPU of these SMs could hold, and no weight."""
    known = [gib for gpu, gib in GPU_MEMORY_GIB.items() if GPU_SM[gpu] in sms]
    return int(max(known or GPU_MEMORY_GIB.values()) * GIB) // kv_bytes_per_token(config, 1)


def plan_jobs(
    config: ModelConfig,
    sms: tuple[int, ...],
    classes: Sequence[PlanLimits],
    directory: Path,
    plan_layers: int | None = None,
    baked: bool = False,
) -> tuple[dict[str, Job], list[dict[str, Any]]]:
    """The jobs by file name, and of each context class its limits and the parts that it runs.

    A part's files: one for all ranks, or baked, one for each.
    """
    package = tensorrt_package(sms[0])
    ranks: Sequence[int | None] = range(config.mapping.tp_size) if baked else (None,)
    jobs: dict[str, Job] = {}
    plans = []
    for limits in classes:
        parts = []
        for part in cut_decoder(config, plan_layers, shared=not baked):
            files = [plan_file(limits, part, rank) for rank in ranks]
            for rank, file in zip(ranks, files, strict=True):
                output = str(directory / file)
                job = Job(package, config.to_dict(), sms, limits, part.like, output, rank)
                jobs.setdefault(file, job)
            first, count = part.part[:2]
            parts.append({"first_layer": first, "num_layers": count, "files": files})
        plans.append({**limits._asdict(), "parts": parts})
    return jobs, plans


def plan_file(limits: PlanLimits, part: PlanPart, rank: int | None = None) -> str:
    """What a part's plan is called; parts that are alike have the first one's name."""
    like = part.like
    own = "" if rank is None else f"-rank{rank}"
    if like.embeds and like.heads:
        return f"decoder-{limits.context}{own}.plan"
    if not like.num_layers:  # depends on no context
        kind = "embedding" if like.embeds else "head"
        return f"{kind}-chunk{limits.chunk}{own}.plan"
    return f"layers-{like.first_layer}-{like.layers[-1]}-{limits.context}{own}.plan"


def _costs(entry: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    """What a context class takes in all, and its file where it is a single one."""
    names = list(dict.fromkeys(name for part in entry["parts"] for name in part["files"]))
    mine = [files[name] for name in names]
    scratch = zip(*(file["scratch_bytes"] for file in mine), strict=True)
    costs = {
        "bytes": sum(file["bytes"] for file in mine),
        "seconds": round(sum(file["seconds"] for file in mine), 1),
        "peak_memory_bytes": max(file["peak_memory_bytes"] for file in mine),
        "scratch_bytes": [max(sizes) for sizes in scratch],
    }
    return costs if len(names) > 1 else {"file": names[0], **costs}


def jobs_at_once(jobs: Sequence[Job], free_bytes: int) -> int:
    """As many as there are cores, and memory for the largest; one where kernels are timed."""
    if jobs[0].package == "tensorrt":
        return 1
    needed = max(_needed_bytes(job) for job in jobs)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, free_bytes // needed, len(jobs)))


def _needed_bytes(job: Job) -> int:
    needed = _BASE_BYTES + job.part.num_layers * _LAYER_BYTES
    if job.rank is not None:
        needed += _BAKED * _part_bytes(job)
    return needed


def _part_bytes(job: Job) -> int:
    table = output_tensors(ModelConfig.from_dict(job.config), 0)
    return sum(
        prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize
        for name, tensor in table.items()
        if job.part.holds(name)
    )


def compile_jobs(
    jobs: dict[str, Job], at_once: int, advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """What each job cost, by name, in the jobs' order; the largest are begun first.

    Raises the first error of a job; the other processes are ended by then.
    """
    processes = _Processes(advance)
    largest = sorted(jobs, key=lambda name: -jobs[name].part.num_layers)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = {pool.submit(processes.run, name, jobs[name]): name for name in largest}
            costs = {futures[done]: done.result() for done in as_completed(futures)}
        finally:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: costs[name] for name in jobs}


class _Processes:
    """The compiling processes; each has a thread here that reads what it says."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, name: str, job: Job) -> dict[str, Any]:
        """Raises PlanError and EngineError as compiling does, EngineError for a lost process."""
        with tempfile.TemporaryFile() as errors:
            process = self._start(errors)
            assert process.stdin is not None and process.stdout is not None
            with process:
                try:
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    pass  # it has ended, which its status tells
                said: dict[str, Any] = {}
                for line in process.stdout:
                    said = json.loads(line)
                    self._advance(said.get("steps", 0))
                process.wait()
            self._running.discard(process)
            if "result" in said:
                result: dict[str, Any] = said["result"]
                return result
            if "error" in said:
                raise (PlanError if said["refused"] else EngineError)(said["error"])
            raise EngineError(_lost(name, process.returncode, errors))

    def _start(self, errors: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "enginehouse.build.tensorrt.worker"]
        pipe = subprocess.PIPE
        with self._lock:
            if self._stopped:
                raise EngineError("compiling was stopped")
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
            self._running.add(process)
        return process

    def stop(self) -> None:
        """End what still runs; nothing is started any more."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.kill()


def _lost(name: str, status: int, errors: Any) -> str:
    if status == -signal.SIGKILL:
        return (
            f"the process that compiled {name} was killed, as it is when memory runs out; free "
            "some, or choose a smaller plan_layers"
        )
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"the process that compiled {name} ended with status {status}: {(lines or ['?'])[-1]}"

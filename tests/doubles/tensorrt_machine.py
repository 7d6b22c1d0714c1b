"""Engines for the double of TensorRT's runtime, a machine whose GPUs are doubles, and what the
torch backend answers.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doubles.cuda_double import CudaDouble, cuda_double
from doubles.tensorrt_double import STREAM, TensorRTDouble, compile_plan
from doubles.tensorrt_ranks import PeerCommunicator, ThreadCommunicator
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.tensorrt.plans import _Processes
from enginehouse.build.tensorrt.worker import run_job
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.machine.gpus import Gpu
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.tensorrt.manifest import read_built
from enginehouse.runtime.tensorrt.rank import TensorRTRank, follow
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import build_engine
from makers.paths import TESTS

RUNTIME = "enginehouse.runtime"
POPEN = subprocess.Popen
PROMPTS = [[5, 6, 7], list(range(40, 90)), [11], list(range(300, 417))]
FLOAT32 = ExecutorOptions(compute_dtype="float32", device="cpu")


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)


def requests(prompts: list[list[int]], sampling: SamplingParams) -> list[Request]:
    return [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]


def torch_answers(engine: Path, work: list[Request]) -> dict[int, list[int]]:
    """The torch backend's from the same rank files."""
    executor = TorchExecutor(read_engine(engine), FLOAT32)
    try:
        return generate(executor, work)
    finally:
        executor.close()


def doubled_engine(source: SourceCheckpoint, output: Path, **settings: Any) -> Path:
    """An engine as `--backend tensorrt` builds it, with the double's plans, for contexts of 64,
    128 and so on, up to max_seq_len.
    """
    values = {"dtype": "float32", "sm": "89", "until": "compile", **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("enginehouse.build.tensorrt.worker.compile_plan", compile_plan)
        patch.setattr(_Processes, "run", lambda self, _, job: run_job(job, self._advance))
        patch.setattr("enginehouse.build.tensorrt.compile._CONTEXT_CLASSES", (64, 128))
        return build_engine(source, output, backend="tensorrt", **values)


def gpus(count: int, sm: int = 89) -> list[Gpu]:
    return [Gpu(i, f"GPU-{i}", f"NVIDIA Double{sm}", sm, 8192, 8192, "580.1") for i in range(count)]


@contextmanager
def doubled_machine(
    patch: pytest.MonkeyPatch,
    count: int = 1,
    sm: int = 89,
    free: int = 2**28,
    processes: bool = False,
) -> Iterator[TensorRTDouble]:
    """A machine with so many GPUs and TensorRT-RTX's double. Further ranks are threads, or with
    `processes` what they are on GPUs.
    """
    trt = TensorRTDouble(sm)
    patch.setattr(f"{RUNTIME}.tensorrt.machine.visible_gpus", lambda: gpus(count, sm))
    patch.setattr(f"{RUNTIME}.tensorrt.machine.find_package", lambda name: trt)
    stream = lambda device: SimpleNamespace(cuda_stream=STREAM + device.index)  # noqa: E731
    event = lambda: SimpleNamespace(record=lambda: None, query=lambda: True)  # noqa: E731
    patch.setattr(torch.cuda, "Stream", stream)
    patch.setattr(torch.cuda, "Event", event)
    for name in ("set_device", "set_stream", "synchronize"):
        patch.setattr(torch.cuda, name, lambda _: None)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    communicator = PeerCommunicator if processes else ThreadCommunicator
    patch.setattr(f"{RUNTIME}.tensorrt.rank.Communicator", communicator)
    patch.setattr(f"{RUNTIME}.tensorrt.executor.make_id", communicator.make_id)
    if processes:
        patch.setattr(f"{RUNTIME}.tensorrt.followers.subprocess.Popen", start_double)
    else:
        patch.setattr(f"{RUNTIME}.tensorrt.followers.spawn_rank", spawn_thread(trt))
    patch.setattr(f"{RUNTIME}.tensorrt.steps._LEAST_ROWS", 32)
    with cuda_double(patch, divmod(sm, 10), free) as trt.cuda:
        yield trt


def start_double(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """The process of a rank, on doubles as this one is."""
    assert command[1:3] == ["-m", "enginehouse.runtime.tensorrt.rank"]
    program = [*command[:2], "doubles.tensorrt_rank_process", *command[3:]]
    return POPEN(program, env={**os.environ, "PYTHONPATH": str(TESTS)}, **options)


def spawn_thread(trt: TensorRTDouble) -> Callable[[Path, int, int], tuple[Connection, Any]]:
    """A rank that follows in a thread of this process, with the pipe that a process would have."""

    def spawn(engine_dir: Path, rank: int, max_seq_len: int) -> tuple[Connection, Any]:
        ours, theirs = Pipe()

        def run() -> None:
            engine = read_engine(engine_dir)
            built = read_built(engine)
            with CudaDouble():
                mine = TensorRTRank(engine, built, trt, rank, max_seq_len)
                follow(mine, theirs)
                mine.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def wait(timeout_s: float | None = None) -> int:
            thread.join(timeout_s)
            return 0

        return ours, SimpleNamespace(wait=wait, kill=lambda: None)

    return spawn

"""A decoder network, or a part of one, becomes a TensorRT plan.

A plan has a profile for decoding and one for chunked prefill. It holds no weight, and serves every
rank and every checkpoint of its shape, unless weights are baked into it. TensorRT-RTX compiles for
GPUs that need not be here, which are named; the data-centre package for the GPU of this machine.
The compiler's own words are turned into one sentence.
Source: TensorRT-RTX 1.7, Python API, CPU-only ahead-of-time builds; TensorRT 11's Python API.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from enginehouse.build.tensorrt.compiler import (
    creation_flags,
    load_compiler,
    require_user_memory,
    set_targets,
)
from enginehouse.build.tensorrt.network import DecoderNetwork, NetworkPart
from enginehouse.build.tensorrt.ops import NetworkOps
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.tensorrt.package import Words

_CONTEXT_CLASSES = (2048, 8192, 32768)
_MAX_CHUNK = 512
_MAX_PROMPTS = 4  # in one step, which has no more tokens than a chunk; scratch is for full chunks
# For one token the compiler has no fused attention over many more rows; where a step could have
# two, it takes another kernel, which has no such limit (seen with TensorRT-RTX 1.7.1: 20480 rows
# compile, 24576 do not).
_ONE_TOKEN_ROWS = 16384
Shapes = tuple[tuple[int, ...], ...]
# What every build without a CUDA driver says, and what points at no layer.
_NOISE = re.compile(
    r"cudaError|cuda error|CUDA (initialization|lazy|driver)|cuInit|nvidia-smi", re.I
)
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")  # said once a profile
# Where in the compiler's source it stands says nothing to a reader.
_WRAPPING = re.compile(
    r"^(?:.*?Error Code \d+: [A-Za-z ]+\()?(?:\[[\w./]+:\d+: \w+\] )?"
    r"(?P<words>.*?)\.?(?: In \w+ at \S+)?\)?\s*$",
    re.S,
)


class PlanLimits(NamedTuple):
    """What one plan takes at most. context: rows of a sequence's cache; chunk: tokens of a prompt
    in one step; prefill_batch: prompts in one step; max_positions: of the rotary tables.
    """

    context: int
    batch: int
    chunk: int
    prefill_batch: int
    max_positions: int


class CompiledPlan(NamedTuple):
    """plan: what the runtime deserialises. peak_memory_bytes: the most that the process that
    compiled it ever held; where that compiles nothing else, what the plan took. scratch_bytes: what
    a GPU needs besides inputs and outputs while it decodes, and while it computes prompts, at most.
    """

    plan: bytes
    seconds: float
    peak_memory_bytes: int
    scratch_bytes: list[int]


def load_tensorrt() -> ModuleType:
    """The TensorRT-RTX package; EngineError when it is not installed."""
    return load_compiler("tensorrt_rtx")


def plan_limits(
    max_seq_len: int, max_batch_size: int, max_num_tokens: int, cached_tokens: int | None = None
) -> list[PlanLimits]:
    """One for each context class up to the engine's own: a slot's memory is its class's.

    The engine's own is rounded up to 64 rows, so that each slot begins where 256 bytes do.
    cached_tokens: whose keys and values a GPU could hold at most; a class has no larger batch than
    that leaves room for, as its scratch memory grows with both.
    """
    longest = -(-max_seq_len // 64) * 64
    contexts = [*(size for size in _CONTEXT_CLASSES if size < longest), longest]
    limits = []
    for context in contexts:
        chunk = min(_MAX_CHUNK, max_num_tokens, context)
        batch = max_batch_size
        if cached_tokens is not None:
            batch = max(1, min(batch, cached_tokens // context))
        prompts = max(1, min(max_num_tokens // chunk, batch, _MAX_PROMPTS))
        limits.append(PlanLimits(context, batch, chunk, prompts, longest))
    return limits


def compile_plan(
    trt: Any,
    config: ModelConfig,
    sms: Sequence[int],
    limits: PlanLimits,
    step: Callable[[str, int, int], None] | None = None,
    part: NetworkPart | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> CompiledPlan:
    """Compile the decoder for GPUs of these SMs; step(phase, done, of) as the compiler goes on.

    part: of the decoder; None for all of it. constants: what `DecoderNetwork` takes. Raises
    PlanError when the compiler refuses, with its reason, and EngineError for a layer that it does
    not accept.
    """
    started_s = time.monotonic()
    scratch_bytes: list[int] = []

    def listen(message: str) -> None:
        if found := _SCRATCH.search(message):
            scratch_bytes.append(int(found[1]))

    words = Words(trt, _NOISE, listen)
    builder = trt.Builder(words.logger)
    network = builder.create_network(creation_flags(trt))
    ops = NetworkOps(trt, network, partial(_sentence, words))
    sizes = limits.context, limits.max_positions
    decoder = DecoderNetwork(ops, config, *sizes, part, constants)
    builder_config = builder.create_builder_config()
    set_targets(trt, builder_config, sms)
    require_user_memory(trt, builder_config)
    for prefill in (False, True):
        profile = _profile(builder.create_optimization_profile(), decoder, limits, prefill)
        builder_config.add_optimization_profile(profile)
    monitor = _monitor(trt, step) if step is not None else None
    if monitor is not None:
        builder_config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, builder_config)
    targets = ", ".join(f"SM{sm}" for sm in sms)
    if plan is None:
        raise PlanError(f"TensorRT refuses the engine for {targets}: {_sentence(words)}")
    seconds = time.monotonic() - started_s
    return CompiledPlan(bytes(plan), seconds, peak_memory(), scratch_bytes)


def _profile(profile: Any, decoder: DecoderNetwork, limits: PlanLimits, prefill: bool) -> Any:
    """The sizes that B, T and L take: one token of many sequences, or many of few."""
    batch = limits.prefill_batch if prefill else limits.batch
    tokens = limits.chunk if prefill else 1
    usual = 1 if prefill else min(16, batch)
    config, context = decoder.config, limits.context
    most = 2 if tokens == 1 and context > _ONE_TOKEN_ROWS else tokens
    sizes: Shapes = ((1, 1), (usual, tokens), (batch, most))
    shapes: dict[str, Shapes] = {
        "write_indices": ((1,), (usual,), (batch,)),
        "last_token_ids": ((1, 1), (usual, 1), (batch, 1)),
        "kv_positions": ((1,), (context,), (context,)),
        "hidden_states": tuple((*size, config.hidden_size) for size in sizes),
    }
    shapes |= dict.fromkeys(("input_ids", "position_ids", "rotary_ids"), sizes)
    for name, (_, *rows) in decoder.fed.items():
        cache: Shapes = tuple((count, *rows) for count in (1, usual, batch))
        profile.set_shape(name, *shapes.get(name, cache))
    return profile


def _sentence(words: Words) -> str:
    """The first thing the compiler said that is not about a missing driver, on one line."""
    found = _WRAPPING.match(words.first())
    assert found is not None
    return found["words"]


def _monitor(trt: Any, step: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step_index: int) -> bool:
            step(phase_name, step_index + 1, self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def peak_memory() -> int:
    """The most that this process ever held, bytes, its libraries included.

    Of the process as it is since it was started; `getrusage` would count what it was forked from.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel gives no VmHWM")

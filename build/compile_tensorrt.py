"""A decoder network becomes TensorRT plans, for GPUs that need not be here.

One plan for each context class, each with a profile for decoding and one for chunked prefill; a
plan holds no weight, and serves every rank and every checkpoint of its shape. Knows no GPU: the
targets are named. The compiler's own words are turned into one sentence.
Source: TensorRT-RTX 1.7, Python API; CPU-only ahead-of-time builds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from enginehouse.build.network import DecoderNetwork
from enginehouse.build.network_ops import NetworkOps
from enginehouse.build.plan import BuildPlan
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.tensorrt_package import PACKAGES, find_package

_CONTEXT_CLASSES = (2048, 8192, 32768)
_MAX_CHUNK = 512
_OUTERMOST, _STEPS = "Building engine", 6
# What every build without a CUDA driver says, and what points at no layer.
_NOISE = re.compile(
    r"cudaError|cuda error|CUDA (initialization|lazy|driver)|cuInit|nvidia-smi", re.I
)
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
    """plan: what the runtime deserialises. peak_memory_bytes: what compiling added at most."""

    plan: bytes
    seconds: float
    peak_memory_bytes: int


def load_tensorrt() -> ModuleType:
    """The TensorRT-RTX package; EngineError when it is not installed."""
    trt = find_package("tensorrt_rtx")
    if trt is None:
        raise EngineError(
            "TensorRT-RTX is not installed, which compiles for backend=tensorrt; "
            f"{PACKAGES['tensorrt_rtx'].install}"
        )
    return trt


def plan_limits(max_seq_len: int, max_batch_size: int, max_num_tokens: int) -> list[PlanLimits]:
    """One plan for each context class up to the engine's own: a slot's memory is its class's.

    The engine's own is rounded up to 64 rows, so that each slot begins where 256 bytes do.
    """
    longest = -(-max_seq_len // 64) * 64
    contexts = [*(size for size in _CONTEXT_CLASSES if size < longest), longest]
    limits = []
    for context in contexts:
        chunk = min(_MAX_CHUNK, max_num_tokens, context)
        prompts = max(1, min(max_num_tokens // chunk, max_batch_size))
        limits.append(PlanLimits(context, max_batch_size, chunk, prompts, longest))
    return limits


def plan_file(limits: PlanLimits) -> str:
    return f"decoder-{limits.context}.plan"


def compile_plan(
    trt: Any,
    config: ModelConfig,
    sms: Sequence[int],
    limits: PlanLimits,
    step: Callable[[str, int, int], None] | None = None,
) -> CompiledPlan:
    """Compile the decoder for GPUs of these SMs; step(phase, done, of) as the compiler goes on.

    Raises PlanError when the compiler refuses, with its reason, and EngineError for a layer that
    it does not accept.
    """
    started_s, before = time.monotonic(), _reset_peak_memory()
    words = _Words(trt)
    builder = trt.Builder(words.logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    ops = NetworkOps(trt, network, words.sentence)
    decoder = DecoderNetwork(ops, config, limits.context, limits.max_positions)
    builder_config = builder.create_builder_config()
    builder_config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        capability = getattr(trt.ComputeCapability, f"SM{sm}")
        builder_config.set_compute_capability(capability, index)
    for prefill in (False, True):
        profile = _profile(builder.create_optimization_profile(), decoder, limits, prefill)
        builder_config.add_optimization_profile(profile)
    monitor = _monitor(trt, step) if step is not None else None
    if monitor is not None:
        builder_config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, builder_config)
    targets = ", ".join(f"SM{sm}" for sm in sms)
    if plan is None:
        raise PlanError(f"TensorRT refuses the engine for {targets}: {words.sentence()}")
    seconds = time.monotonic() - started_s
    return CompiledPlan(bytes(plan), seconds, max(0, _peak_memory() - before))


def write_plans(plan: BuildPlan, directory: Path, progress: BuildProgress) -> dict[str, Any]:
    """Put the plans into an engine's folder; what its manifest says of them.

    Peak memory holds at most one plan of some MiB twice; weights are not read.
    """
    trt = load_tensorrt()
    limits = plan_limits(plan.max_seq_len, plan.settings.max_batch_size, plan.max_num_tokens)
    plans = []
    with progress.stage("compile", len(limits) * _STEPS, "steps") as stage:
        for each in limits:
            steps = _Steps(stage.advance)
            compiled = compile_plan(trt, plan.config, plan.targets, each, steps)
            steps.finish()
            (directory / plan_file(each)).write_bytes(compiled.plan)
            plans.append(
                {
                    "file": plan_file(each),
                    **each._asdict(),
                    "bytes": len(compiled.plan),
                    "seconds": round(compiled.seconds, 1),
                    "peak_memory_bytes": compiled.peak_memory_bytes,
                }
            )
        sizes = mib(sum(item["bytes"] for item in plans))
        targets = ", ".join(f"SM{sm}" for sm in plan.targets)
        stage.finish(f"{len(plans)} TensorRT plans for {targets}, {sizes}")
    version = str(trt.__version__)
    return {"package": "tensorrt_rtx", "version": version, "targets": plan.targets, "plans": plans}


class _Steps:
    """The compiler's many phases as a number of steps: `Building engine` is the outermost."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._done = 0

    def __call__(self, phase: str, done: int, of: int) -> None:
        if phase == _OUTERMOST and done < _STEPS:
            self._advance(1)
            self._done += 1

    def finish(self) -> None:
        self._advance(_STEPS - self._done)


def _profile(profile: Any, decoder: DecoderNetwork, limits: PlanLimits, prefill: bool) -> Any:
    """The sizes that B, T and L take: one token of many sequences, or many of few."""
    batch = limits.prefill_batch if prefill else limits.batch
    tokens = limits.chunk if prefill else 1
    usual = 1 if prefill else min(16, batch)
    config, context = decoder.config, limits.context
    for name in ("input_ids", "position_ids", "rotary_ids"):
        profile.set_shape(name, (1, 1), (usual, tokens), (batch, tokens))
    profile.set_shape("write_indices", (1,), (usual,), (batch,))
    profile.set_shape("last_token_ids", (1, 1), (usual, 1), (batch, 1))
    profile.set_shape("kv_positions", (1,), (context,), (context,))
    rows = (decoder.kv_heads, context, config.head_size)
    for layer in range(config.num_hidden_layers):
        for side in ("key", "value"):
            sizes = [(count, *rows) for count in (1, usual, batch)]
            profile.set_shape(f"past_{side}_{layer}", *sizes)
    return profile


class _Words:
    """Keeps what the compiler says, and gives the part that explains a refusal."""

    def __init__(self, trt: Any) -> None:
        said: list[str] = []
        self._said = said
        serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in serious and not _NOISE.search(message):
                    said.append(message)

        self.logger = Logger()

    def sentence(self) -> str:
        """The first thing it said that is not about a missing driver, on one line."""
        if not self._said:
            return "it gave no reason"
        found = _WRAPPING.match(self._said[0])
        assert found is not None
        return " ".join(found["words"].split())


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


def _reset_peak_memory() -> int:
    """Start the process's peak anew where the kernel allows it; what it holds now, bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then the process's whole life's
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    return 0

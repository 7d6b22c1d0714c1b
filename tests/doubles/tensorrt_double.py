"""A stand-in for the half of TensorRT-RTX that runs plans, where there is no GPU: strict, on a CPU.

`compile_plan` writes a plan that only this double loads; loading it defines the project's network
anew over the recording network, and execute_async_v3 computes that in torch on whatever lies behind
the addresses it was given. It refuses what TensorRT refuses, and what would be undefined there: an
input without address or shape, shapes outside the profile, memory that is nobody's, outputs over
inputs but for the caches', rows written past a cache's end, scratch memory that is too small or in
use by another stream, ranks that run unlike steps; what a run leaves in scratch memory is rubbish.
It shows that the runtime keeps to the API, not that a GPU computes. Names are TensorRT's;
enumerations are the real package's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from doubles.recording_network import DTYPES, RecordedWeights, RecordingNetwork
from doubles.tensorrt_ranks import Exchange
from enginehouse.build.tensorrt.compile import CompiledPlan, PlanLimits, _profile, load_tensorrt
from enginehouse.build.tensorrt.network import DecoderNetwork, NetworkPart
from enginehouse.build.tensorrt.ops import NetworkOps
from enginehouse.runtime.config import ModelConfig

REAL = load_tensorrt()
MAGIC = b"doubled\n"
HEADER = 64
STREAM = 0x5EED


def compile_plan(
    trt: Any,
    config: ModelConfig,
    sms: Sequence[int],
    limits: PlanLimits,
    step: Callable[[str, int, int], None] | None = None,
    part: NetworkPart | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> CompiledPlan:
    """In place of `build.tensorrt.compile.compile_plan`: what `Runtime` of here loads."""
    header = json.dumps({"version": REAL.__version__, "sms": list(sms)}).encode()
    facts = {"config": config.to_dict(), "limits": limits, "part": part}
    plan = (MAGIC + header).ljust(HEADER) + json.dumps(facts).encode() + b"\n"
    return CompiledPlan(plan + (save(dict(constants)) if constants else b""), 0.1, 1, [1, 2])


class Profile:
    """An IOptimizationProfile: the least, usual and largest shape of each input."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self.shapes[name] = (least, usual, most)


class TensorRTDouble:
    """What the runtime takes for the module. sm: the GPU's; executions: what ran, in order.

    takes_cache: whether a runtime cache from a file is accepted.
    """

    EngineValidity = REAL.EngineValidity
    EngineInvalidityDiagnostics = REAL.EngineInvalidityDiagnostics
    CudaGraphStrategy = REAL.CudaGraphStrategy
    ExecutionContextAllocationStrategy = REAL.ExecutionContextAllocationStrategy
    TensorIOMode = REAL.TensorIOMode
    ILogger = REAL.ILogger

    def __init__(self, sm: int = 89) -> None:
        self.__version__ = REAL.__version__
        self.sm = sm
        self.executions: list[SimpleNamespace] = []
        self.contexts: list[Context] = []
        self.takes_cache = True
        self.cuda: Any = None  # the device's double, which counts what waits for it
        self.scratch: dict[int, _Region] = {}  # in use just now, by stream
        self._known: set[tuple[int, int]] = set()
        self._held: set[tuple[int, int]] = set()
        self._memory = threading.Lock()  # ranks are threads here

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)

    def check_memory(self, regions: list[tuple[int, int]]) -> None:
        """Every region (address, bytes) lies within one tensor's memory, as far as it was seen:
        memory that was let go of meanwhile is not noticed.
        """
        with self._memory:
            new = set(regions) - self._known
            if not all(self._inside(*region) for region in new):
                for thing in gc.get_objects():
                    if issubclass(type(thing), Tensor):
                        storage = thing.untyped_storage()
                        self._held.add((storage.data_ptr(), storage.nbytes()))
            for address, size in new:
                assert self._inside(address, size), f"{size} bytes at {address:#x} are in no tensor"
            self._known |= new

    def _inside(self, address: int, size: int) -> bool:
        return any(at <= address and address + size <= at + n for at, n in self._held)


class Runtime:
    """IRuntime."""

    engine_header_size = HEADER

    def __init__(self, trt: TensorRTDouble, logger: Any) -> None:
        self.trt = trt
        self.logger = logger

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        bits, flags = 0, REAL.EngineInvalidityDiagnostics
        if not header.startswith(MAGIC):
            bits = flags.MALFORMED_ENGINE.value
        else:
            facts = json.loads(header[len(MAGIC) : HEADER])
            bits |= flags.VERSION_MISMATCH.value * (facts["version"] != self.trt.__version__)
            bits |= flags.UNSUPPORTED_CC.value * (self.trt.sm not in facts["sms"])
        validity = REAL.EngineValidity
        return (validity.INVALID if bits else validity.VALID), bits

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if self.get_engine_validity(plan[:HEADER])[1]:
            self.logger.log(REAL.ILogger.Severity.ERROR, "the plan is not valid")
            return None
        facts, _, constants = plan[HEADER:].partition(b"\n")
        return Engine(self.trt, self.logger, json.loads(facts), constants)


class RuntimeCache:
    """IRuntimeCache: the shapes that were run stand for the kernels made for them."""

    def __init__(self, trt: TensorRTDouble) -> None:
        self.trt = trt
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return "\n".join(sorted(self.kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if self.trt.takes_cache:
            self.kernels |= set(blob.decode().split("\n"))
        return self.trt.takes_cache


class RuntimeConfig:
    """IRuntimeConfig."""

    def __init__(self, trt: TensorRTDouble) -> None:
        self._trt = trt
        self.cache: RuntimeCache | None = None
        self.cuda_graph_strategy = REAL.CudaGraphStrategy.DISABLED
        self.user_managed = False

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.user_managed = strategy == REAL.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    """ICudaEngine over the recording network."""

    def __init__(
        self, trt: TensorRTDouble, logger: Any, plan: dict[str, Any], constants: bytes
    ) -> None:
        self.trt = trt
        self.logger = logger
        limits = PlanLimits(*plan["limits"])
        self.config = ModelConfig.from_dict(plan["config"])
        self.part = NetworkPart(*plan["part"])
        with torch._C.DisableTorchFunction():
            self.network = RecordingNetwork()
            ops = NetworkOps(
                SimpleNamespace(**vars(REAL) | {"Weights": RecordedWeights}), self.network
            )
            sizes = limits.context, limits.max_positions
            baked = load(constants) if constants else None
            decoder = DecoderNetwork(ops, self.config, *sizes, self.part, baked)
        self.profiles = [
            _profile(Profile(), decoder, limits, prefill).shapes for prefill in (False, True)
        ]
        self.names = [*self.network.inputs, *(out.name for out in self.network.outputs)]
        produced = {id(layer.output): layer for layer in self.network.layers}
        self.aliases: dict[str, str] = {}
        for out in self.network.outputs:
            source = produced[id(out)].inputs[0].name
            if source.startswith("past_"):
                self.aliases[out.name] = source

    @property
    def device_memory_size_v2(self) -> int:
        """So much that a part needs more than a shorter one, and prefill more than decoding."""
        tokens = "input_ids" if self.part.embeds else "hidden_states"
        most = max(math.prod(shapes[tokens][2][:2]) for shapes in self.profiles)
        return 4 * most * self.config.hidden_size * (1 + self.part.num_layers)

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = REAL.TensorIOMode
        return modes.INPUT if name in self.network.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(REAL.DataType, self.network.inputs[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.network.inputs[name][1]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.trt)

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        assert config.user_managed, "memory of its own for a context"
        context = Context(self, config)
        self.trt.contexts.append(context)
        return context


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine = engine
        self.config = config
        self.profile: int | None = None
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stream: int | None = None
        self.scratch: _Region | None = None
        self.communicator: Exchange | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert self.profile is None
        self.profile, self.stream = index, stream
        return index < len(self.engine.profiles)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2, "the scratch memory is too small"
        self.scratch = _Region(memory, "INT8", (size,))

    def set_communicator(self, capsule: Exchange) -> bool:
        capsule.wait()
        self.communicator = capsule
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names and type(address) is int and address > 0, name
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "a shape before a profile"
        known = self.engine.get_tensor_shape(name)
        least, _, most = self.engine.profiles[self.profile].get(name, (known, known, known))
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            self._refuse(f"{name}: {shape} is not between {least} and {most}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def _refuse(self, words: str) -> None:
        self.engine.logger.log(REAL.ILogger.Severity.ERROR, words)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.stream, "another stream than the one that the copies went through"
        if self.scratch is None:
            self._refuse("no device memory was given")
            return False
        running = self.engine.trt.scratch
        for other, used in list(running.items()):
            apart = other == stream or self.scratch.apart(used)
            assert apart, "another stream uses the same scratch memory"
        running[stream] = self.scratch
        try:
            with torch._C.DisableTorchFunction(), torch.inference_mode():
                return self._execute()
        finally:
            del running[stream]

    def _execute(self) -> bool:
        network, inputs = self.engine.network, {}
        for name in self.engine.names:
            if name not in self.addresses:
                self._refuse(f"{name} has no address")
                return False
        for name, (dtype, known, _) in network.inputs.items():
            shape = self.shapes.get(name, known)
            if -1 in shape:
                self._refuse(f"{name} has no shape")
                return False
            inputs[name] = _Region(self.addresses[name], dtype, shape)
        name, out = self._output(inputs)
        self._check(inputs, name, out)
        feeds = {name: region.tensor() for name, region in inputs.items()}
        batch, tokens = self._sizes(inputs)
        for cache in self.engine.aliases.values():
            first, rows = feeds["write_indices"], feeds[cache].shape[2]
            assert bool(((first >= 0) & (first + tokens <= rows)).all()), "rows past a cache's end"
        if self.communicator is None:
            assert self.engine.config.mapping.tp_size == 1, "ranks without a communicator"
            (found,) = network.run([feeds])
        else:
            found = self.communicator.run(network, feeds)
        assert self.scratch is not None
        self.scratch.tensor().fill_(-1)  # NaN in every dtype
        out.tensor().copy_(found[name])
        looked_at = len(feeds.get("kv_positions", ()))
        if self.config.cache is not None:
            self.config.cache.kernels.add(f"{self.profile} {batch} {tokens} {looked_at}")
        rank = 0 if self.communicator is None else self.communicator.rank
        said = SimpleNamespace(
            rank=rank,
            context=self,
            part=self.engine.part,
            profile=self.profile,
            batch=batch,
            tokens=tokens,
            looked_at=looked_at,
        )
        self.engine.trt.executions.append(said)
        return True

    def _sizes(self, inputs: dict[str, _Region]) -> tuple[int, ...]:
        """B and T."""
        return inputs["input_ids" if self.engine.part.embeds else "hidden_states"].shape[:2]

    def _output(self, inputs: dict[str, _Region]) -> tuple[str, _Region]:
        """What the part gives besides its caches."""
        batch, tokens = self._sizes(inputs)
        config = self.engine.config
        if self.engine.part.heads:
            return "logits", _Region(self.addresses["logits"], "FLOAT", (batch, config.vocab_size))
        (dtype,) = (name for name, its in DTYPES.items() if its == getattr(torch, config.dtype))
        shape = (batch, tokens, config.hidden_size)
        return "next_hidden_states", _Region(self.addresses["next_hidden_states"], dtype, shape)

    def _check(self, inputs: dict[str, _Region], name: str, out: _Region) -> None:
        """No output lies over an input, but for a cache's over its own; scratch over nothing."""
        for present, source in self.engine.aliases.items():
            lies = self.addresses[present] == self.addresses[source]
            assert lies, f"{present} is not over {source}"
        assert self.scratch is not None
        everything = {**inputs, name: out, "scratch": self.scratch}
        self.engine.trt.check_memory([(one.address, one.size) for one in everything.values()])
        for one, region in everything.items():
            if one in (name, "scratch") or one.startswith("past_"):
                for other, its in everything.items():
                    assert one == other or region.apart(its), f"{one} lies over {other}"


class _Region:
    """Memory at an address, as a tensor; INT4 has two values in a byte."""

    def __init__(self, address: int, dtype: str, shape: Sequence[int]) -> None:
        shape = (*shape[:-1], shape[-1] // 2) if dtype == "INT4" else tuple(shape)
        self.address = address
        self.dtype = torch.uint8 if dtype == "INT4" else DTYPES[dtype]
        self.shape = shape
        self.size = math.prod(shape) * self.dtype.itemsize

    def apart(self, other: _Region) -> bool:
        before = self.address + self.size <= other.address
        return before or other.address + other.size <= self.address

    def tensor(self) -> Tensor:
        memory = (ctypes.c_char * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).view(self.shape)

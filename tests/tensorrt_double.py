"""A stand-in for the half of TensorRT-RTX that runs plans, where there is no GPU: strict, on a CPU.

`compile_plan` writes a plan that only this double loads; loading it defines the project's network
anew over the recording network, and execute_async_v3 computes that in torch on whatever lies behind
the addresses it was given. It refuses what TensorRT refuses, and what would be undefined there: an
input without address or shape, shapes outside the profile, memory that is nobody's, outputs over
inputs but for the caches', rows written past a cache's end, ranks that run unlike steps. It shows
that the runtime keeps to the API, not that a GPU computes. Names are TensorRT's; enumerations are
the real package's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recording_network import DTYPES, RecordingNetwork
from torch import Tensor

from enginehouse.build import compile_tensorrt
from enginehouse.build.compile_tensorrt import CompiledPlan, PlanLimits
from enginehouse.build.network import DecoderNetwork, NetworkPart, whole_decoder
from enginehouse.build.network_ops import NetworkOps
from enginehouse.runtime.config import ModelConfig

REAL = compile_tensorrt.load_tensorrt()
MAGIC = b"doubled\n"
HEADER = 64
STREAM = 0x5EED
_WAIT_S = 10


def compile_plan(
    trt: Any,
    config: ModelConfig,
    sms: Sequence[int],
    limits: PlanLimits,
    step: Callable[[str, int, int], None] | None = None,
    part: NetworkPart | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> CompiledPlan:
    """In place of `build.compile_tensorrt.compile_plan`: what `Runtime` of here loads."""
    assert part == whole_decoder(config) and constants is None, "one plan, weights as inputs"
    header = json.dumps({"version": REAL.__version__, "sms": list(sms)}).encode()
    body = json.dumps({"config": config.to_dict(), "limits": limits._asdict()}).encode()
    plan = (MAGIC + header).ljust(HEADER) + body
    return CompiledPlan(plan, 0.1, 1)


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
    TensorIOMode = REAL.TensorIOMode
    ILogger = REAL.ILogger

    def __init__(self, sm: int = 89) -> None:
        self.__version__ = REAL.__version__
        self.sm = sm
        self.executions: list[SimpleNamespace] = []
        self.contexts: list[Context] = []
        self.takes_cache = True
        self.cuda: Any = None  # the device's double, which counts what waits for it
        self._known: set[tuple[int, int]] = set()
        self._held: set[tuple[int, int]] = set()

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)

    def check_memory(self, regions: list[tuple[int, int]]) -> None:
        """Every region (address, bytes) lies within one tensor's memory, as far as it was seen:
        memory that was let go of meanwhile is not noticed.
        """
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
        return Engine(self.trt, self.logger, json.loads(plan[HEADER:]))


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

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    """ICudaEngine over the recording network."""

    def __init__(self, trt: TensorRTDouble, logger: Any, plan: dict[str, Any]) -> None:
        self.trt = trt
        self.logger = logger
        limits = PlanLimits(**plan["limits"])
        self.config = ModelConfig.from_dict(plan["config"])
        with torch._C.DisableTorchFunction():
            self.network = RecordingNetwork()
            ops = NetworkOps(REAL, self.network)
            decoder = DecoderNetwork(ops, self.config, limits.context, limits.max_positions)
        self.profiles = [
            compile_tensorrt._profile(Profile(), decoder, limits, prefill).shapes
            for prefill in (False, True)
        ]
        self.names = [*self.network.inputs, *(out.name for out in self.network.outputs)]
        produced = {id(layer.output): layer for layer in self.network.layers}
        self.aliases: dict[str, str] = {}
        for out in self.network.outputs:
            source = produced[id(out)].inputs[0].name
            if source.startswith("past_"):
                self.aliases[out.name] = source

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

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        context = Context(self, config or RuntimeConfig(self.trt))
        self.trt.contexts.append(context)
        return context


class Group:
    """NCCL's part: ranks that wait for each other, and steps that all of them must run alike."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._feeds: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
        self._outputs: list[dict[str, Tensor]] = []
        self._network: RecordingNetwork | None = None
        self._barrier = threading.Barrier(num_ranks)

    def wait(self) -> None:
        self._barrier.wait(_WAIT_S)

    def run(
        self, rank: int, network: RecordingNetwork, feeds: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The last to come computes for all."""
        self._feeds[rank] = feeds
        if self._barrier.wait(_WAIT_S) == 0:
            shapes = [{k: v.shape for k, v in feeds.items()} for feeds in self._feeds]
            assert all(shape == shapes[0] for shape in shapes), "the ranks run unlike steps"
            self._outputs = network.run(self._feeds)
        self.wait()
        return self._outputs[rank]


class CommunicatorDouble:
    """A `tensorrt_nccl.Communicator` whose capsule is itself."""

    groups: dict[bytes, Group] = {}

    def __init__(self, nccl_id: bytes, num_ranks: int, rank: int) -> None:
        self.group = self.groups.setdefault(nccl_id, Group(num_ranks))
        self.rank = rank
        self.capsule = self
        self.aborted = False

    @classmethod
    def make_id(cls) -> bytes:
        return f"group {len(cls.groups)}".encode().ljust(128)

    def abort(self) -> None:
        self.aborted = True


class PeerCommunicator:
    """Two ranks in two processes: each computes its own part, and collectives go over a socket."""

    def __init__(self, nccl_id: bytes, num_ranks: int, rank: int) -> None:
        assert num_ranks == 2
        self.rank = rank
        self.group = self
        self.capsule = self
        self.aborted = False
        address = nccl_id.rstrip(b"\0").decode()
        if rank == 0:
            with Listener(address) as listener:
                self._peer = listener.accept()
        else:
            deadline_s = time.monotonic() + _WAIT_S
            while not Path(address).exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)
            self._peer = Client(address)
        self._mine: set[int] = set()

    @classmethod
    def make_id(cls) -> bytes:
        return f"{tempfile.mkdtemp()}/peer".encode().ljust(128, b"\0")

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """Both ranks' tensors, in the ranks' order."""
        data = tensor.flatten().clone().numpy().tobytes()
        if self.rank == 0:
            self._peer.send_bytes(data)
        other = bytearray(self._peer.recv_bytes())
        if self.rank == 1:
            self._peer.send_bytes(data)
        theirs = torch.frombuffer(other, dtype=tensor.dtype).view(tensor.shape)
        return [tensor, theirs] if self.rank == 0 else [theirs, tensor]

    def wait(self) -> None:
        self.exchange(torch.zeros(1))

    def run(
        self, rank: int, network: RecordingNetwork, feeds: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if id(network) not in self._mine:
            self._mine.add(id(network))
            for layer in network.layers:
                if layer.collective is not None:
                    assert layer.num_ranks == 2
                    layer.collective, layer.num_ranks = self._over_socket(layer.collective), 1
        shape = torch.tensor([*feeds["input_ids"].shape, len(feeds["kv_positions"])])
        one, other = self.exchange(shape)
        assert torch.equal(one, other), "the ranks run unlike steps"
        (found,) = network.run([feeds])
        return found

    def _over_socket(
        self, collective: Callable[[list[Tensor]], list[Tensor]]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda parts: [collective(self.exchange(parts[0]))[self.rank]]

    def abort(self) -> None:
        self.aborted = True


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine = engine
        self.config = config
        self.profile: int | None = None
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.communicator: CommunicatorDouble | PeerCommunicator | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM and self.profile is None
        self.profile = index
        return index < len(self.engine.profiles)

    def set_communicator(self, capsule: CommunicatorDouble | PeerCommunicator) -> bool:
        capsule.group.wait()
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
        assert stream == STREAM, "another stream than the one that the copies went through"
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            return self._execute()

    def _execute(self) -> bool:
        network, regions = self.engine.network, {}
        for name in self.engine.names:
            if name not in self.addresses:
                self._refuse(f"{name} has no address")
                return False
        for name, (dtype, known, _) in network.inputs.items():
            shape = self.shapes.get(name, known)
            if -1 in shape:
                self._refuse(f"{name} has no shape")
                return False
            regions[name] = _Region(self.addresses[name], dtype, shape)
        batch = regions["input_ids"].shape[0]
        vocab = self.engine.config.vocab_size
        out = _Region(self.addresses["logits"], "FLOAT", (batch, vocab))
        self._check(regions, out)
        feeds = {name: region.tensor() for name, region in regions.items()}
        tokens = feeds["input_ids"].shape[1]
        first = feeds["write_indices"]
        rows = regions["past_key_0"].shape[2]
        assert bool(((first >= 0) & (first + tokens <= rows)).all()), "rows past a cache's end"
        if self.communicator is None:
            assert self.engine.config.mapping.tp_size == 1, "ranks without a communicator"
            (found,) = network.run([feeds])
        else:
            found = self.communicator.group.run(self.communicator.rank, network, feeds)
        out.tensor().copy_(found["logits"])
        looked_at = len(feeds["kv_positions"])
        if self.config.cache is not None:
            self.config.cache.kernels.add(f"{self.profile} {batch} {tokens} {looked_at}")
        rank = 0 if self.communicator is None else self.communicator.rank
        said = SimpleNamespace(
            rank=rank, profile=self.profile, batch=batch, tokens=tokens, looked_at=looked_at
        )
        self.engine.trt.executions.append(said)
        return True

    def _check(self, regions: dict[str, _Region], out: _Region) -> None:
        """No output lies over an input, but for a cache's over its own."""
        for name, source in self.engine.aliases.items():
            assert self.addresses[name] == self.addresses[source], f"{name} is not over {source}"
        everything = [*regions.items(), ("logits", out)]
        self.engine.trt.check_memory([(one.address, one.size) for _, one in everything])
        written = [(n, one) for n, one in everything if n == "logits" or n.startswith("past_")]
        for name, one in written:
            for other_name, other in everything:
                apart = one.address + one.size <= other.address
                apart = apart or other.address + other.size <= one.address
                assert apart or name == other_name, f"{name} lies over {other_name}"


class _Region:
    """Memory at an address, as a tensor; INT4 has two values in a byte."""

    def __init__(self, address: int, dtype: str, shape: Sequence[int]) -> None:
        shape = (*shape[:-1], shape[-1] // 2) if dtype == "INT4" else tuple(shape)
        self.address = address
        self.dtype = torch.uint8 if dtype == "INT4" else DTYPES[dtype]
        self.shape = shape
        self.size = math.prod(shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        memory = (ctypes.c_char * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).view(self.shape)

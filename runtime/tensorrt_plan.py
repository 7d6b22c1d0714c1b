"""One plan, loaded: its two contexts, what is bound to their inputs, and its runtime cache.

Knows addresses, shapes and names; it knows no sequence and no slot but the first of a step.
Source: TensorRT-RTX 1.7 Python API (IExecutionContext, IRuntimeConfig, IRuntimeCache).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt_commands import Step, step_layout
from enginehouse.runtime.tensorrt_package import Words

log = logging.getLogger("enginehouse.tensorrt")

_DECODE, _PREFILL = 0, 1  # the profiles, in the order in which the plan was compiled
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT4": torch.uint8,  # two in a byte
}


class LoadedPlan:
    """A plan's engine and a context for each of its profiles, which decode and prefill.

    package: tensorrt_rtx has a runtime cache, kept in cache_file, and captures CUDA graphs by
    itself, which decoding asks for: its addresses stay the same. stream: a CUDA stream's handle.
    """

    def __init__(
        self, trt: Any, package: str, words: Words, path: Path, cache_file: Path, stream: int
    ) -> None:
        self.trt = trt
        self.path = path
        self.stream = stream
        self._words = words
        self._cache_file = cache_file
        self._runtime_cache: Any = None
        self._cached = b""
        runtime = trt.Runtime(words.logger)
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise words.refused(f"cannot load {path}")
        self._contexts = [self._context(package, profile) for profile in (_DECODE, _PREFILL)]
        self._shapes: list[tuple[int, int, int]] = [(0, 0, 0)] * 2
        self._first_slots: list[int | None] = [None, None]
        self.caches: dict[str, Tensor] = {}
        self._present: dict[str, str] = {}  # a cache's output -> its input
        self._fed: Tensor | None = None

    def _context(self, package: str, profile: int) -> Any:
        if package == "tensorrt_rtx":
            config = self.engine.create_runtime_config()
            strategies = self.trt.CudaGraphStrategy
            graphs = profile == _DECODE
            strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
            config.cuda_graph_strategy = strategy
            if self._runtime_cache is None:
                self._runtime_cache = self._open_runtime_cache(config)
            config.set_runtime_cache(self._runtime_cache)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise self._words.refused(f"gives no context for {self.path}")
        if not context.set_optimization_profile_async(profile, self.stream):
            raise self._words.refused(f"has no profile {profile} in {self.path}")
        return context

    def _open_runtime_cache(self, config: Any) -> Any:
        """The kernels that earlier runs made, where TensorRT still takes them."""
        cache = config.create_runtime_cache()
        if self._cache_file.exists():
            self._cached = self._cache_file.read_bytes()
            if not cache.deserialize(self._cached):
                log.warning("%s is not for this machine and is written anew", self._cache_file)
                self._cached = b""
        return cache

    def save_runtime_cache(self) -> None:
        """Keep the kernels made so far beside the engine; a folder that cannot be written to
        costs the next start its time, and no more.
        """
        if self._runtime_cache is None:
            return
        found = bytes(self._runtime_cache.serialize())
        if found == self._cached:
            return
        partial = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}.partial")
        try:
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(found)
            partial.replace(self._cache_file)
            self._cached = found
        except OSError as error:
            log.warning("TensorRT's runtime cache is not kept: %s", error)

    def share_communicator(self, capsule: Any) -> None:
        """Let both contexts exchange over NCCL. Waits until every rank has called it."""
        for context in self._contexts:
            if not context.set_communicator(capsule):
                raise self._words.refused("takes no communicator")

    def bind(
        self, weights: Mapping[str, Tensor], caches: Mapping[str, Tensor], fed: Tensor, out: Tensor
    ) -> None:
        """Set every address that no step changes, after checking that the plan wants just these.

        weights: what does not change between steps. caches: `past_key_0`, ..., each [slots,
        kv_heads, S, head_size]. fed: int32, where a step's inputs are put. out: the logits,
        float32 [batch, vocab_size].
        """
        self.caches = dict(caches)
        self._fed = fed
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        inputs = {name for name in names if self.engine.get_tensor_mode(name) == mode}
        wanted = inputs - caches.keys() - step_layout(1, 1)[0].keys()
        missing = [*(wanted - weights.keys()), *(caches.keys() - inputs)]
        if missing:
            raise EngineError(
                f"{self.path} and the rank file do not fit: {', '.join(sorted(missing))} is in one "
                "of them only; build the engine again"
            )
        for name in sorted(wanted):
            self._check(name, weights[name])
            self._address(name, weights[name].data_ptr())
        self._address("logits", out.data_ptr())
        for name in set(names) - inputs - {"logits"}:
            self._present[name] = self.engine.get_aliased_input_tensor(name)
        if sorted(self._present.values()) != sorted(caches):
            raise EngineError(
                f"{self.path} does not write its caches in place; build the engine again"
            )

    def _check(self, name: str, tensor: Tensor) -> None:
        """EngineError when a weight is not of the plan's dtype and shape."""
        dtype = self.engine.get_tensor_dtype(name).name
        shape = [int(size) for size in self.engine.get_tensor_shape(name)]
        if dtype == "INT4":
            shape[-1] //= 2
        if name == "kv_positions":
            shape = list(tensor.shape)
        if tensor.dtype != _DTYPES.get(dtype) or list(tensor.shape) != shape:
            raise EngineError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} and {self.path} wants {dtype} "
                f"{shape}; build the engine again"
            )
        assert tensor.is_contiguous(), name

    def _address(self, name: str, address: int, profile: int | None = None) -> None:
        for index, context in enumerate(self._contexts):
            if profile in (None, index) and not context.set_tensor_address(name, address):
                raise self._words.refused(f"takes no address for {name}")

    def run(self, step: Step) -> None:
        """Enqueue a step whose data is in `fed`. Raises EngineError when TensorRT does not."""
        profile = _PREFILL if step.prefill else _DECODE
        if self._shapes[profile] != (step.batch, step.tokens, step.looked_at):
            self._set_shapes(profile, step)
        if self._first_slots[profile] != step.first_slot:
            self._set_slots(profile, step.first_slot)
        if not self._contexts[profile].execute_async_v3(self.stream):
            raise self._words.refused(f"cannot run {self.path}")

    def _set_shapes(self, profile: int, step: Step) -> None:
        assert self._fed is not None, "a step before bind"
        context, fields = self._contexts[profile], step_layout(step.batch, step.tokens)[0]
        shapes = {name: field.shape for name, field in fields.items()}
        shapes["kv_positions"] = (step.looked_at,)
        for name, cache in self.caches.items():
            shapes[name] = (step.batch, *cache.shape[1:])
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._words.refused(f"takes no {name} of {list(shape)}")
        for name, field in fields.items():
            address = self._fed.data_ptr() + field.offset * self._fed.itemsize
            self._address(name, address, profile)
        self._shapes[profile] = (step.batch, step.tokens, step.looked_at)

    def _set_slots(self, profile: int, first: int) -> None:
        """The caches from a slot on, and their outputs in the same place."""
        addresses = {
            name: cache.data_ptr() + first * cache.stride(0) * cache.itemsize
            for name, cache in self.caches.items()
        }
        for name, address in addresses.items():
            self._address(name, address, profile)
        for name, past in self._present.items():
            self._address(name, addresses[past], profile)
        self._first_slots[profile] = first

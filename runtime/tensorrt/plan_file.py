"""One plan file, deserialised: its engine, of which contexts are made, and its runtime cache.

Knows no address but that of the scratch memory, no part of a decoder and no step.
Source: TensorRT-RTX 1.7 Python API (ICudaEngine, IRuntimeConfig, IRuntimeCache).
"""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from enginehouse.runtime.tensorrt.package import Words

log = logging.getLogger("enginehouse.tensorrt")

DECODE, PREFILL = 0, 1  # the profiles, in the order in which a plan was compiled


class PlanFile:
    """A plan's engine. scratch_bytes: what each context needs while it runs.

    package: tensorrt_rtx has a runtime cache, kept in cache_file, and captures CUDA graphs by
    itself, which decoding asks for: its addresses stay the same.
    """

    def __init__(
        self, trt: Any, package: str, words: Words, runtime: Any, path: Path, cache_file: Path
    ) -> None:
        self.trt = trt
        self.path = path
        self.words = words
        self._runtime = runtime  # outlives its engines
        self._jit = package == "tensorrt_rtx"
        self._cache_file = cache_file
        self._runtime_cache: Any = None
        self._cached = b""
        with path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:  # may hold weights
                self.engine = runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise words.refused(f"cannot load {path}")
        self.scratch_bytes = int(self.engine.device_memory_size_v2)

    def new_context(self, profile: int, stream: int, scratch: Tensor) -> Any:
        """A context of a profile, which uses `scratch` while it runs: with others of the stream,
        one after another.
        """
        config = self.engine.create_runtime_config()
        strategies = self.trt.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        if self._jit:
            graphs = self.trt.CudaGraphStrategy
            decodes = profile == DECODE
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if decodes else graphs.DISABLED
            if self._runtime_cache is None:
                self._runtime_cache = self._open_runtime_cache(config)
            config.set_runtime_cache(self._runtime_cache)
        context = self.engine.create_execution_context(config)
        if context is None:
            raise self.words.refused(f"gives no context for {self.path}")
        context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
        if not context.set_optimization_profile_async(profile, stream):
            raise self.words.refused(f"has no profile {profile} in {self.path}")
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
        serialized = self._runtime_cache.serialize()
        found = b"" if serialized is None else bytes(serialized)
        if found in (b"", self._cached):
            return
        partial = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}.partial")
        try:
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(found)
            partial.replace(self._cache_file)
            self._cached = found
        except OSError as error:
            log.warning("TensorRT's runtime cache is not kept: %s", error)

"""The packages that compile plans, and where each does: which is wanted, and how they differ.

`tensorrt_rtx` compiles for named SMs on any machine. `tensorrt`, the data-centre package, compiles
for the GPU that it finds, and times kernels on it. The layers are the same.
Source: TensorRT-RTX 1.7's and TensorRT 11's Python API and release notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.gpus import visible_gpus
from enginehouse.runtime.tensorrt.package import PACKAGES, find_package

_LEAST_MAJOR = 11  # earlier ones lack the cache, rotary and attention layers


def load_compiler(package: str) -> ModuleType:
    """A package of PACKAGES; EngineError when it is not installed, or too old."""
    trt = find_package(package)
    known = PACKAGES[package]
    if trt is None:
        raise EngineError(
            f"{known.title} is not installed, which compiles for backend=tensorrt; {known.install}"
        )
    version = str(trt.__version__)
    if package == "tensorrt" and int(version.partition(".")[0]) < _LEAST_MAJOR:
        raise EngineError(
            f"TensorRT {version} is installed, and backend=tensorrt needs {_LEAST_MAJOR} or later; "
            f"pip install 'tensorrt>={_LEAST_MAJOR}' in an environment without TensorRT-LLM 1.2"
        )
    return trt


def check_compiler(package: str, sms: Sequence[int]) -> ModuleType:
    """The package, where it can compile for these SMs: EngineError when it cannot on this machine.

    The data-centre package wants a GPU of the one SM first among the visible ones.
    """
    if package == "tensorrt_rtx":
        return load_compiler(package)
    (sm,) = sms
    gpus = visible_gpus()
    if not gpus or gpus[0].sm != sm:
        found = f"the first here is {gpus[0].name} (SM{gpus[0].sm})" if gpus else "none is here"
        raise EngineError(
            f"TensorRT compiles for SM{sm} on a machine with such a GPU only, and {found}; build "
            "there, or choose backend=tensorrt_llm"
        )
    return load_compiler(package)


def creation_flags(trt: Any) -> int:
    """For a strongly typed network, which every network of TensorRT 11 is."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def set_targets(trt: Any, builder_config: Any, sms: Sequence[int]) -> None:
    """Name the SMs to the compiler that can be told; the other has its GPU."""
    if trt.__name__ == "tensorrt":
        return
    builder_config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        capability = getattr(trt.ComputeCapability, f"SM{sm}")
        builder_config.set_compute_capability(capability, index)


def require_user_memory(trt: Any, builder_config: Any) -> None:
    """Let a plan need no memory as it runs but what its context is given: TensorRT-RTX else takes
    more for large shapes, which no CUDA graph can hold. The other package never does.
    """
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if flag is not None:
        builder_config.set_flag(flag)

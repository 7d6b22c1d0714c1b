"""What this machine has, gathered once: libraries, GPUs, compilers, room.

Nothing is imported that could hang: libraries are tried in child processes with a deadline. Knows
not what is wanted of any of it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from enginehouse.build.tensorrt_llm.builder import find_builder
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.machine.binding import installed_version, nvidia_smi
from enginehouse.runtime.machine.gpus import Gpu, visible_gpus

_DISTRIBUTIONS = ("torch", "tensorrt_llm", "tensorrt", "transformers", "xgrammar")
_LIBRARY_S = 20
_MPI = """
import ctypes
text, size = ctypes.create_string_buffer(9000), ctypes.c_int()
ctypes.CDLL("libmpi.so.40").MPI_Get_library_version(text, ctypes.byref(size))
print(text.value.decode())
"""
_NUMA = "import ctypes; print(ctypes.CDLL('libnuma.so.1').numa_available())"
_CUDA = """
import ctypes
cuda, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert cuda.cuDriverGetVersion(ctypes.byref(found)) == 0
print(found.value)
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. None stands for what is not there; sizes are bytes.

    cxx: the command of the C++ compiler. compiled_bindings: whether the tensorrt_llm package holds
    its compiled library, or is a stub.
    driver_cuda: the newest CUDA the driver runs, 13000 for 13.0. mpi: what libmpi.so.40 says of
    itself. p2p: nvidia-smi's table of reads between GPUs.
    """

    python: tuple[int, int] = (0, 0)
    processor: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    compiled_bindings: bool = False
    builder: str | None = None
    cxx: str | None = None
    driver_cuda: int | None = None
    gpus: tuple[Gpu, ...] = ()
    p2p: str | None = None
    mpi: str | None = None
    numa: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    disk_free: int = 0
    memory_free: int = 0
    shm: int = 0
    memlock: int | None = None  # None: no limit


def gather(directory: Path) -> Facts:
    """Look at this machine. directory: where engines would be written."""
    cuda = _library(_CUDA)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    try:
        builder = find_builder()
    except PlanError:
        builder = None
    try:
        cxx: str | None = shlex.join(find_compiler())
    except EngineError:
        cxx = None
    return Facts(
        python=sys.version_info[:2],
        processor=platform.machine(),
        versions={name: installed_version(name) for name in _DISTRIBUTIONS},
        compiled_bindings=_has_bindings(),
        builder=builder,
        cxx=cxx,
        driver_cuda=int(cuda) if cuda and cuda.strip().isdigit() else None,
        gpus=tuple(visible_gpus()),
        p2p=nvidia_smi("topo", "-p2p", "r"),
        mpi=_library(_MPI),
        numa=_library(_NUMA) is not None,
        env=dict(os.environ),
        disk_free=shutil.disk_usage(directory).free,
        memory_free=psutil.virtual_memory().available,
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0,
        memlock=None if memlock == resource.RLIM_INFINITY else memlock,
    )


def _library(code: str) -> str | None:
    """What a few lines of Python print, in a process of their own; None when they fail or hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=_LIBRARY_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _has_bindings() -> bool:
    """Whether the tensorrt_llm package has its compiled part. It is not imported."""
    spec = importlib.util.find_spec("tensorrt_llm")
    folders = spec.submodule_search_locations if spec is not None else None
    return any(any(Path(folder).glob("bindings*.so")) for folder in folders or ())

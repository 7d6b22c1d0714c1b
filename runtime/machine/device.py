"""Where the torch backend computes: the device, its dtype, its free memory, what it multiplies.

Knows nothing of models.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine import cpu

CPU = torch.device("cpu")
DEVICES = ("auto", "cpu", "cuda")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Products(NamedTuple):
    """Which quantised weights a device multiplies as they are; others are dequantised once."""

    fp8: bool
    int4: bool
    int8: bool


def choose_device(name: str) -> torch.device:
    """auto: the first CUDA device where torch finds one, else the CPU. CUDA_VISIBLE_DEVICES says
    which is the first.

    Raises EngineError for another name, and for cuda where there is none.
    """
    if name not in DEVICES:
        raise EngineError(f"device {name!r}; wanted auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise EngineError(
            f"device cuda was asked for and torch {torch.__version__} finds no GPU; install "
            "NVIDIA's driver and a CUDA build of torch, or ask for cpu"
        )
    return torch.device("cuda", 0)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16, AMX, or Arm BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        words = set(cpuinfo.read_text(errors="replace").split())
        return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return platform.machine() == "arm64"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies it natively (GPUs from SM80 on), else float32."""
    if name == "auto":
        native = _capability(device) >= (8, 0) if device.type == "cuda" else cpu_has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    if name not in _DTYPES:
        raise EngineError(f"compute_dtype {name!r}; wanted auto, {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def native_products(device: torch.device, dtype: torch.dtype) -> Products:
    """FP8 from SM89 on; INT4 and INT8 by torch's packed kernels, which are for bfloat16: in float32
    the CPU's take 20 to 500 times as long as a product of dequantised weights.
    """
    packed = dtype == torch.bfloat16
    if device.type != "cuda":
        return Products(fp8=False, int4=packed, int8=packed)
    capability = _capability(device)
    return Products(fp8=capability >= (8, 9), int4=packed and capability >= (8, 0), int8=False)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return cpu.free_memory()


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(values)] on the device. A GPU's copy is queued: nothing waits for it."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the CPU, on the device; from pinned memory, so that no one waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU they take no memory until they are written (torch.zeros touches every page)."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )

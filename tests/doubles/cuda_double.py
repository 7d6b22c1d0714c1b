"""A GPU that is none: tensors that say they are on cuda:0, refuse those that are not, and count.

Arithmetic is the CPU's; the two products over packed 4-bit weights, which torch has on GPUs only,
and that of FP8, which is slow elsewhere, are written out here. What waits for the device is noted
in `waits`: copies back, copies of memory that is not pinned, and shapes that depend on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select")
_WAITING_TOO = ("__float__", "__int__", "__bool__", "__index__")
_INDEXING = ("__getitem__", "__setitem__")


class GpuTensor(Tensor):
    """A CPU tensor that is called one of cuda:0."""


class CudaDouble(TorchFunctionMode):
    """While it is entered, device "cuda" gives GpuTensors, and they meet no others."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.products: list[str] = []
        self._pinned: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        if func is torch.device:
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_gpu = [t for t in tensors if isinstance(t, GpuTensor)]
        devices = [torch.device(leaf) for leaf in leaves if _is_device(leaf)]
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA if on_gpu else torch.device("cpu")
        if name == "pin_memory":
            pinned = args[0].clone()
            self._pinned.add(id(pinned))
            pinned.keep = pinned  # its id stays its own
            return pinned
        if name == "to" and devices:
            return self._moved(args[0], devices[0], leaves)
        others = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim()]
        if on_gpu and others:
            raise RuntimeError(f"{name}: tensors on cuda:0 and on cpu")
        target = devices[0].type if devices else "cuda" if on_gpu else "cpu"
        if target == "cuda" and name in ("tensor", "as_tensor"):
            self.waits.append(name)
        if on_gpu:
            self._note(name, args, kwargs)
        if devices:
            args, kwargs = tree_map(lambda x: "cpu" if _is_device(x) else x, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            found = _PRODUCTS.get(name, func)(*args, **kwargs) if on_gpu else func(*args, **kwargs)
        if target == "cpu":
            return found
        if name == "__iter__":
            return iter([_wrapped(row) for row in found])
        return tree_map(_wrapped, found)

    def _moved(self, tensor: Tensor, device: torch.device, leaves: list[Any]) -> Tensor:
        for dtype in (leaf for leaf in leaves if isinstance(leaf, torch.dtype)):
            tensor = tensor.to(dtype)
        if device.type == "cpu" and isinstance(tensor, GpuTensor):
            self.waits.append("to cpu")
            return tensor.as_subclass(Tensor)
        if device.type == "cuda" and not isinstance(tensor, GpuTensor):
            if id(tensor) not in self._pinned:
                self.waits.append("to cuda")
            return tensor.clone().as_subclass(GpuTensor)
        return tensor

    def _note(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in (*_WAITING, *_WAITING_TOO) or (name == "where" and len(args) == 1):
            self.waits.append(name)
        if name in _INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            asks = [isinstance(i, list) or getattr(i, "dtype", 0) == torch.bool for i in index]
            if any(asks):
                self.waits.append(name)
        if name in _PRODUCTS:
            self.products.append(name)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda"))


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, GpuTensor)
    return value.as_subclass(GpuTensor) if plain else value


def _pack(pairs: Tensor, inner_tiles: int) -> Tensor:
    """int32 [out, in] in [0, 15] from uint8 [out, in // 2], high nibbles first."""
    out_features, in_features = pairs.shape[0], pairs.shape[1] * 2
    assert pairs.dtype == torch.uint8 and pairs.is_contiguous() and inner_tiles in (2, 4, 8)
    assert out_features % 8 == 0 and in_features % (inner_tiles * 16) == 0
    both = torch.stack([pairs >> 4, pairs & 15], dim=-1)
    return both.flatten(1).to(torch.int32)


def _int4_product(x: Tensor, packed: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """As int4mm.cu says: (q - 8) * scale + zero; everything but q in bfloat16."""
    assert x.dtype == scale_and_zero.dtype == torch.bfloat16 and x.is_contiguous()
    assert group_size in (32, 64, 128, 256)
    groups, out_features = packed.shape[1] // group_size, packed.shape[0]
    assert scale_and_zero.shape == (groups, out_features, 2) and scale_and_zero.is_contiguous()
    scale, zero = scale_and_zero.float().transpose(0, 1).unbind(-1)  # [out, groups]
    values = (packed.float() - 8).view(out_features, groups, group_size)
    weight = (values * scale[..., None] + zero[..., None]).flatten(1)
    return (x.float() @ weight.T).to(x.dtype)


def _fp8_product(
    x: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As cuBLASLt wants its operands, summed in float32. The CPU's takes 30 times as long."""
    assert x.dtype == weight.dtype == torch.float8_e4m3fn and x.is_contiguous()
    assert weight.t().is_contiguous() and all(size % 16 == 0 for size in weight.shape)
    assert scale_a.dtype == scale_b.dtype == torch.float32
    return (x.float() @ weight.float() * scale_a * scale_b).to(out_dtype)


_PRODUCTS = {
    "_convert_weight_to_int4pack": _pack,
    "_weight_int4pack_mm": _int4_product,
    "_scaled_mm": _fp8_product,
}


@contextmanager
def cuda_double(
    patch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), free: int = 2**28
) -> Iterator[CudaDouble]:
    """One GPU of that compute capability with so many free bytes."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    with CudaDouble() as double:
        yield double

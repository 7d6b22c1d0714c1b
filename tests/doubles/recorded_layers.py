"""What a recording network is made of: tensors, layers, and what each operation computes.

Source: TensorRT 11 operator reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "DIV": torch.div,
    "FLOOR_DIV": torch.floor_divide,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "AND": torch.logical_and,
    "GREATER": torch.gt,
    "EQUAL": torch.eq,
}
UNARY = {
    "SQRT": torch.sqrt,
    "ABS": torch.abs,
    "NOT": torch.logical_not,
    "FLOOR": torch.floor,
    "LOG": torch.log,
}
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "RELU": torch.relu,
    "GELU_ERF": torch.nn.functional.gelu,
    "GELU_TANH": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
FLOATS = ("FLOAT", "HALF", "BF16")


class Recorded:
    """An ITensor: a dtype by TensorRT's name, a rank, and a place among the values. shape: of
    sizes that are not known yet.
    """

    def __init__(self, index: int, dtype: str, rank: int) -> None:
        self.index = index
        self.dtype = dtype
        self.rank = rank
        self.name = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (-1,) * self.rank


def to_e4m3(values: Tensor) -> Tensor:
    """Rounded to the nearest, and saturated."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


class Layer:
    """An ILayer: compute(values of its inputs) -> value; attributes are read when it runs."""

    def __init__(self, compute: Callable[..., Tensor], inputs: list[Recorded]) -> None:
        self.compute = compute
        self.inputs = inputs
        self.collective: Callable[[list[Tensor]], list[Tensor]] | None = None
        self.output: Recorded
        self.second: Recorded
        self.name = ""
        self.mask: Recorded | None = None
        self.axis = self.axes = None
        self.num_elementwise_dims = 0
        self.first_transpose = self.second_transpose = self._reshape_dims = None
        self.decomposable = False
        self.num_ranks = 1
        self.mode: Any = None

    def get_output(self, index: int) -> Recorded:
        return self.second if index else self.output

    def set_input(self, index: int, value: Recorded) -> None:
        assert index >= len(self.inputs), "optional inputs come in their order"
        self.inputs.append(value)

    @property
    def reshape_dims(self) -> tuple[int, ...] | None:
        return self._reshape_dims

    @reshape_dims.setter
    def reshape_dims(self, dims: tuple[int, ...]) -> None:
        self._reshape_dims = dims
        self.output.rank = len(dims)


def elementwise_changes_rank(layer: Layer) -> None:
    """A gather whose leading axes run along has one axis less for each of them."""
    whole = layer.output.rank

    class Gather(Layer):
        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            if name == "num_elementwise_dims":
                self.output.rank = whole - value

    layer.__class__ = Gather


def fed(name: str, value: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """An input as the layers see it; INT4 is unpacked, the low nibble first."""
    if dtype == "INT4":
        assert value.dtype == torch.uint8, name
        nibbles = np.stack([value.numpy() & 15, value.numpy() >> 4], axis=-1)
        signed = np.where(nibbles > 7, nibbles.astype(np.int8) - 16, nibbles).astype(np.int8)
        value = torch.from_numpy(signed.reshape(*value.shape[:-1], -1))
    else:
        assert value.dtype == DTYPES[dtype], f"{name}: {value.dtype} for {dtype}"
    fits = all(size in (-1, found) for size, found in zip(shape, value.shape, strict=True))
    assert fits, f"{name}: {tuple(value.shape)} for {shape}"
    return value

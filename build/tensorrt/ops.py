"""TensorRT's layers as functions from tensors to a tensor, for the network's author.

Knows no model and no weight. `trt` is a module with TensorRT's names (`tensorrt_rtx`, `tensorrt`),
`network` anything that answers as its INetworkDefinition does.
Source: TensorRT 11 and TensorRT-RTX 1.7 Python API, INetworkDefinition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch

from enginehouse.runtime.errors import EngineError

Value = Any  # TensorRT's ITensor


class NetworkOps:
    """Adds layers one by one; every layer is named after the part of the model it belongs to.

    Shapes stand at the methods: B, T are dynamic. `explain` gives the compiler's last words,
    for a layer that it refuses.
    """

    def __init__(self, trt: Any, network: Any, explain: Callable[[], str] = lambda: "") -> None:
        self.trt = trt
        self.network = network
        self._explain = explain
        self._scope: list[str] = []
        self._count = 0
        self._alive: list[Any] = []  # constants must outlive the build

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is added in the body belongs to this part of the model."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def dtype(self, name: str) -> Any:
        """TensorRT's dtype for torch's name of it; `int4` and `bool` have none in torch."""
        names = {
            "float32": "FLOAT",
            "float16": "HALF",
            "bfloat16": "BF16",
            "float8_e4m3fn": "FP8",
            "int4": "INT4",
            "int8": "INT8",
            "int32": "INT32",
            "int64": "INT64",
            "bool": "BOOL",
        }
        return getattr(self.trt.DataType, names[name])

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        """A network input; -1 is a size that is known when it runs."""
        value = self.network.add_input(name, self.dtype(dtype), tuple(shape))
        if value is None:
            raise self._refused(f"input {name}")
        return value

    def output(self, value: Value, name: str) -> None:
        value.name = name
        self.network.mark_output(value)

    def constant(self, values: Any, dtype: str = "float32") -> Value:
        """A small constant, float32 or int32 or int64, in the shape it is given."""
        array = np.array(values, dtype=dtype, order="C")
        self._alive.append(array)
        return self._out(
            self.network.add_constant(array.shape, self.trt.Weights(array)), "constant"
        )

    def weight(self, dtype: str, shape: Sequence[int], tensor: torch.Tensor) -> Value:
        """A weight as a constant: `tensor` holds it on the CPU, INT4 as two values in a byte."""
        kept = tensor.contiguous()
        self._alive.append(kept)
        count = prod(shape)
        assert kept.nbytes == (count // 2 if dtype == "int4" else count * kept.itemsize)
        weights = self.trt.Weights(self.dtype(dtype), kept.data_ptr(), count)
        return self._out(self.network.add_constant(tuple(shape), weights), "weight")

    def number(self, value: float, rank: int, dtype: str = "float32") -> Value:
        """One number that broadcasts over a tensor of this rank."""
        return self.constant(np.full((1,) * rank, value), dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        return self._out(self.network.add_cast(x, self.dtype(dtype)), "cast")

    def elementwise(self, operation: str, a: Value, b: Value) -> Value:
        """SUM, SUB, PROD, DIV, FLOOR_DIV, MAX, MIN, AND, GREATER, EQUAL; sizes of 1 broadcast."""
        op = getattr(self.trt.ElementWiseOperation, operation)
        return self._out(self.network.add_elementwise(a, b, op), operation.lower())

    def unary(self, operation: str, x: Value) -> Value:
        """SQRT, ABS, NOT, FLOOR, LOG."""
        op = getattr(self.trt.UnaryOperation, operation)
        return self._out(self.network.add_unary(x, op), operation.lower())

    def activation(self, operation: str, x: Value) -> Value:
        """SIGMOID, TANH, GELU_TANH, GELU_ERF, RELU."""
        op = getattr(self.trt.ActivationType, operation)
        return self._out(self.network.add_activation(x, op), operation.lower())

    def reduce(self, operation: str, x: Value, *axes: int) -> Value:
        """AVG, SUM or MAX over axes, which stay with size 1."""
        op, mask = getattr(self.trt.ReduceOperation, operation), sum(1 << axis for axis in axes)
        return self._out(self.network.add_reduce(x, op, mask, True), operation.lower())

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        layer = self.network.add_concatenation(list(parts))
        if layer is not None:
            layer.axis = axis
        return self._out(layer, "concat")

    def softmax(self, x: Value, axis: int) -> Value:
        layer = self.network.add_softmax(x)
        if layer is not None:
            layer.axes = 1 << axis
        return self._out(layer, "softmax")

    def top_k(self, x: Value, count: int, axis: int) -> tuple[Value, Value]:
        """The `count` largest along an axis, falling, and the int32 places where they stood."""
        layer = self.network.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << axis)
        return self._out(layer, "top_k"), layer.get_output(1)

    def select(self, condition: Value, then: Value, other: Value) -> Value:
        return self._out(self.network.add_select(condition, then, other), "select")

    def matmul(self, a: Value, b: Value, transpose: bool = False) -> Value:
        """a @ b, or a @ b.T of the last two axes; leading sizes of 1 broadcast."""
        kinds = self.trt.MatrixOperation
        kind = kinds.TRANSPOSE if transpose else kinds.NONE
        return self._out(self.network.add_matrix_multiply(a, kinds.NONE, b, kind), "matmul")

    def reshape(
        self,
        x: Value,
        dims: Sequence[int],
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Value:
        """Transpose by `before`, reshape, transpose by `after`; 0 keeps a size, -1 is the rest."""
        layer = self.network.add_shuffle(x)
        if layer is not None:
            if before is not None:
                layer.first_transpose = tuple(before)
            layer.reshape_dims = tuple(dims)
            if after is not None:
                layer.second_transpose = tuple(after)
        return self._out(layer, "reshape")

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        layer = self.network.add_shuffle(x)
        if layer is not None:
            layer.first_transpose = tuple(order)
        return self._out(layer, "transpose")

    def shape(self, x: Value) -> Value:
        """The sizes of x: int64 [rank]."""
        return self._out(self.network.add_shape(x), "shape")

    def slice(self, x: Value, start: Sequence[int], sizes: Value) -> Value:
        """The block of x from `start` on; sizes: int64 [rank], known when it runs."""
        rank = len(start)
        layer = self.network.add_slice(x, tuple(start), (0,) * rank, (1,) * rank)
        if layer is not None:
            layer.set_input(2, sizes)
        return self._out(layer, "slice")

    def padded(self, x: Value, sizes: Value, value: Value | None = None) -> Value:
        """x with elements behind it on every axis, up to `sizes`, int64 [rank]: zeros, or `value`,
        of x's dtype and rank 0.
        """
        rank = len(x.shape)
        layer = self.network.add_slice(x, (0,) * rank, (0,) * rank, (1,) * rank)
        if layer is not None:
            layer.set_input(2, sizes)
            layer.mode = self.trt.SampleMode.FILL
            if value is not None:
                layer.set_input(4, value)
        return self._out(layer, "padded")

    def gather(self, x: Value, indices: Value, axis: int, batch_axes: int = 0) -> Value:
        """x's elements at int32 indices of one axis; batch_axes leading axes run along."""
        layer = self.network.add_gather(x, indices, axis)
        if layer is not None:
            layer.num_elementwise_dims = batch_axes
        return self._out(layer, "gather")

    def quantize_fp8(self, x: Value, scale: Value) -> Value:
        """x / scale, rounded to e4m3 and saturated; scale: float32 of rank 0."""
        layer = self.network.add_quantize(x, scale, self.dtype("float8_e4m3fn"))
        return self._out(layer, "quantize")

    def dequantize(self, q: Value, scale: Value, dtype: str, axis: int | None = None) -> Value:
        """q * scale: one scale (rank 0), one along `axis`, or blocks along axis 0 of a matrix."""
        layer = self.network.add_dequantize(q, scale, self.dtype(dtype))
        if layer is not None and axis is not None:
            layer.axis = axis
        return self._out(layer, "dequantize")

    def rotary(
        self,
        x: Value,
        cos: Value,
        sin: Value,
        positions: Value,
        rotary_dim: int,
        interleaved: bool = False,
    ) -> Value:
        """Rotate pairs (i, i + rotary_dim / 2) of x [B, heads, T, D] by the tables' rows, or pairs
        of neighbours (2 i, 2 i + 1).

        cos, sin: [rows, rotary_dim / 2] in x's dtype; positions: int32 [B, T].
        """
        layer = self.network.add_rotary_embedding(x, cos, sin, interleaved, rotary_dim)
        if layer is not None:
            layer.set_input(3, positions)
        return self._out(layer, "rotary")

    def update_cache(self, cache: Value, update: Value, write_indices: Value) -> Value:
        """The cache input [B, kv_heads, S, D] with `update` [B, kv_heads, T, D] written in place,
        from write_indices [B] on; rows beyond S are dropped.
        """
        mode = self.trt.KVCacheMode.LINEAR
        layer = self.network.add_kv_cache_update(cache, update, write_indices, mode)
        return self._out(layer, "cache")

    def attention(self, q: Value, k: Value, v: Value, mask: Value, fused: bool) -> Value:
        """softmax(q @ k.T) @ v under a boolean mask [B, 1, T, L]; q is scaled already.

        fused: refuse rather than fall back to single products.
        """
        kinds = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        layer = self.network.add_attention_v2(q, k, v, *kinds)
        if layer is not None:
            layer.mask = mask
            layer.decomposable = not fused
        return self._out(layer, "attention")

    def all_reduce(self, x: Value, ranks: int) -> Value:
        """The sum over all ranks, on each of them."""
        return self._collective(x, "ALL_REDUCE", "SUM", ranks)

    def all_gather(self, x: Value, ranks: int) -> Value:
        """The ranks' tensors one after another along axis 0, on each of them."""
        return self._collective(x, "ALL_GATHER", "NONE", ranks)

    def _collective(self, x: Value, operation: str, reduction: str, ranks: int) -> Value:
        op = getattr(self.trt.CollectiveOperation, operation)
        by = getattr(self.trt.ReduceOperation, reduction)
        layer = self.network.add_dist_collective(x, op, by, -1, [])
        if layer is not None:
            layer.num_ranks = ranks
        return self._out(layer, operation.lower())

    def _out(self, layer: Any, kind: str) -> Value:
        where = ".".join(self._scope)
        if layer is None:
            raise self._refused(f"{where}: {kind}")
        self._count += 1
        layer.name = f"{where}/{kind}.{self._count}"
        return layer.get_output(0)

    def _refused(self, what: str) -> EngineError:
        words = self._explain() or "it gave no reason"
        return EngineError(f"TensorRT refuses a layer of the network, {what}: {words}")


class StepInputs:
    """The inputs that every step feeds, as the network's parts ask for them: `shapes`, by name."""

    def __init__(self, ops: NetworkOps) -> None:
        self.ops = ops
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: str = "int32") -> Value:
        self.shapes[name] = tuple(shape)
        return self.ops.input(name, dtype, shape)

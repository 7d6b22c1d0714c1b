"""A stand-in for TensorRT's INetworkDefinition that computes: each layer call, done in torch.

Layers are recorded as the network is defined, with the checks of a strongly typed network, and
`run` computes them for all tensor parallel ranks in lockstep, so that collectives have what they
sum. Written from TensorRT's documentation of each layer, not from the network that uses it.
Source: TensorRT 11 operator reference; NvInfer.h of 11.1 for KV cache, rotary and attention.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doubles.recorded_layers import (
    ACTIVATION,
    DTYPES,
    ELEMENTWISE,
    FLOATS,
    UNARY,
    Layer,
    Recorded,
    elementwise_changes_rank,
    fed,
    to_e4m3,
)


class RecordedWeights:
    """trt.Weights: of an array, or of so many values at an address, which must stay there."""

    def __init__(self, given: Any, address: int | None = None, count: int = 0) -> None:
        self.dtype = given
        self.address = address
        self.count = count

    def numpy(self) -> Any:
        return self.dtype


class RecordingNetwork:
    """What the network's author calls, and `run`. inputs: name -> (dtype, shape, tensor)."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[str, tuple[int, ...], Recorded]] = {}
        self.outputs: list[Recorded] = []
        self.layers: list[Layer] = []
        self._count = 0

    def _tensor(self, dtype: str, rank: int) -> Recorded:
        self._count += 1
        return Recorded(self._count - 1, dtype, rank)

    def _layer(
        self, dtype: str, rank: int, compute: Callable[..., Tensor], *inputs: Recorded
    ) -> Layer:
        layer = Layer(compute, list(inputs))
        layer.output = self._tensor(dtype, rank)
        self.layers.append(layer)
        return layer

    def run(self, ranks: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Each rank's outputs from its inputs, by name. Cache inputs are written in place.

        An INT4 input is uint8 with its last axis halved. A wrong dtype or shape is an error.
        """
        values: list[dict[int, Tensor]] = [{} for _ in ranks]
        for feeds, known in zip(ranks, values, strict=True):
            assert feeds.keys() == self.inputs.keys(), feeds.keys() ^ self.inputs.keys()
            for name, (dtype, shape, tensor) in self.inputs.items():
                known[tensor.index] = fed(name, feeds[name], dtype, shape)
        for layer in self.layers:
            index = layer.output.index
            found = [
                layer.compute(layer, *(known[item.index] for item in layer.inputs))
                if layer.mask is None
                else layer.compute(layer, *(known[i.index] for i in (*layer.inputs, layer.mask)))
                for known in values
            ]
            if layer.collective is not None:
                assert layer.num_ranks == len(ranks), "a collective of another number of ranks"
                found = layer.collective(found)
            for known, value in zip(values, found, strict=True):
                assert value.ndim == layer.output.rank, layer.name
                wanted = torch.int8 if layer.output.dtype == "INT4" else DTYPES[layer.output.dtype]
                assert value.dtype == wanted, f"{layer.name}: {value.dtype}, wanted {wanted}"
                known[index] = value
        return [{out.name: known[out.index] for out in self.outputs} for known in values]

    # The methods of INetworkDefinition, by its names.

    def add_input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Recorded:
        assert name not in self.inputs, f"input {name} a second time"
        tensor = self._tensor(dtype.name, len(shape))
        tensor.name = name
        self.inputs[name] = (dtype.name, shape, tensor)
        return tensor

    def mark_output(self, tensor: Recorded) -> None:
        assert tensor.name and tensor.name not in [out.name for out in self.outputs]
        self.outputs.append(tensor)

    def add_constant(self, shape: tuple[int, ...], weights: Any) -> Layer:
        if getattr(weights, "address", None) is not None:
            return self._weight(shape, weights)
        value = torch.from_numpy(np.array(weights.numpy()).reshape(shape))
        names = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
        return self._layer(names[value.dtype], len(shape), lambda _: value)

    def _weight(self, shape: tuple[int, ...], weights: RecordedWeights) -> Layer:
        dtype: str = weights.dtype.name
        packed = dtype == "INT4"
        stored = torch.uint8 if packed else DTYPES[dtype]
        assert weights.count == prod(shape) and weights.address is not None
        size = weights.count * stored.itemsize // (2 if packed else 1)
        raw = bytearray(ctypes.string_at(weights.address, size))
        kept = torch.frombuffer(raw, dtype=stored)
        kept = kept.view((*shape[:-1], shape[-1] // 2) if packed else shape)
        value = fed("a constant", kept, dtype, shape)
        return self._layer(dtype, len(shape), lambda _: value)

    def add_cast(self, x: Recorded, dtype: Any) -> Layer:
        to = DTYPES[dtype.name]
        return self._layer(dtype.name, x.rank, lambda _, v: v.to(to), x)

    def add_elementwise(self, a: Recorded, b: Recorded, op: Any) -> Layer:
        assert a.dtype == b.dtype and a.rank == b.rank, (op, a.dtype, b.dtype, a.rank, b.rank)
        assert op.name != "DIV" or a.dtype in FLOATS
        dtype = "BOOL" if op.name in ("GREATER", "EQUAL", "AND") else a.dtype
        assert op.name != "AND" or a.dtype == "BOOL"
        return self._layer(dtype, a.rank, lambda _, x, y: ELEMENTWISE[op.name](x, y), a, b)

    def add_unary(self, x: Recorded, op: Any) -> Layer:
        assert (x.dtype == "BOOL") == (op.name == "NOT")
        return self._layer(x.dtype, x.rank, lambda _, v: UNARY[op.name](v), x)

    def add_activation(self, x: Recorded, op: Any) -> Layer:
        assert x.dtype in FLOATS
        return self._layer(x.dtype, x.rank, lambda _, v: ACTIVATION[op.name](v), x)

    def add_reduce(self, x: Recorded, op: Any, axes: int, keep_dims: bool) -> Layer:
        kept = [i for i in range(x.rank) if axes >> i & 1]
        reduce = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax}[op.name]
        assert keep_dims and x.dtype in FLOATS
        return self._layer(x.dtype, x.rank, lambda _, v: reduce(v, dim=kept, keepdim=True), x)

    def add_concatenation(self, parts: Sequence[Recorded]) -> Layer:
        first = parts[0]
        assert all((part.dtype, part.rank) == (first.dtype, first.rank) for part in parts)

        def compute(layer: Layer, *values: Tensor) -> Tensor:
            assert isinstance(layer.axis, int)
            return torch.cat(values, dim=layer.axis)

        return self._layer(first.dtype, first.rank, compute, *parts)

    def add_softmax(self, x: Recorded) -> Layer:
        def compute(layer: Layer, v: Tensor) -> Tensor:
            assert isinstance(layer.axes, int)
            return torch.softmax(v, dim=layer.axes.bit_length() - 1)

        return self._layer(x.dtype, x.rank, compute, x)

    def add_topk(self, x: Recorded, op: Any, k: int, axes: int) -> Layer:
        assert op.name == "MAX" and x.dtype in FLOATS and axes.bit_count() == 1
        dim = axes.bit_length() - 1
        layer = self._layer(x.dtype, x.rank, lambda _, v: torch.topk(v, k, dim).values, x)
        places = lambda _, v: torch.topk(v, k, dim).indices.int()  # noqa: E731
        layer.second = self._layer("INT32", x.rank, places, x).output
        return layer

    def add_select(self, condition: Recorded, then: Recorded, other: Recorded) -> Layer:
        assert condition.dtype == "BOOL" and then.dtype == other.dtype
        assert condition.rank == then.rank == other.rank
        compute = lambda _, c, x, y: torch.where(c, x, y)  # noqa: E731
        return self._layer(then.dtype, then.rank, compute, condition, then, other)

    def add_matrix_multiply(self, a: Recorded, op_a: Any, b: Recorded, op_b: Any) -> Layer:
        assert a.dtype == b.dtype and a.dtype in FLOATS and a.rank == b.rank
        assert op_a.name == "NONE"
        turned = op_b.name == "TRANSPOSE"
        compute = lambda _, x, y: x @ (y.mT if turned else y)  # noqa: E731
        return self._layer(a.dtype, a.rank, compute, a, b)

    def add_shuffle(self, x: Recorded) -> Layer:
        def compute(layer: Layer, v: Tensor) -> Tensor:
            if layer.first_transpose is not None:
                v = v.permute(layer.first_transpose)
            if layer.reshape_dims is not None:
                sizes = [
                    v.shape[i] if size == 0 else size for i, size in enumerate(layer.reshape_dims)
                ]
                v = v.reshape(sizes)
            return v if layer.second_transpose is None else v.permute(layer.second_transpose)

        return self._layer(x.dtype, x.rank, compute, x)

    def add_shape(self, x: Recorded) -> Layer:
        return self._layer("INT64", 1, lambda _, v: torch.tensor(v.shape), x)

    def add_slice(self, x: Recorded, start: Any, shape: Any, stride: Any) -> Layer:
        assert all(step == 1 for step in stride)

        def compute(layer: Layer, v: Tensor, sizes: Tensor, *value: Tensor) -> Tensor:
            if layer.mode is not None:
                assert layer.mode.name == "FILL" and not any(start)
                wider = v.new_zeros(sizes.tolist()) if not value else value[0].expand(*sizes)
                wider = wider.clone()
                wider[tuple(slice(size) for size in v.shape)] = v
                return wider
            for axis, (first, size) in enumerate(zip(start, sizes.tolist(), strict=True)):
                assert 0 <= first and first + size <= v.shape[axis], "a slice beyond its tensor"
                v = v.narrow(axis, first, size)
            return v

        return self._layer(x.dtype, x.rank, compute, x)

    def add_gather(self, x: Recorded, indices: Recorded, axis: int) -> Layer:
        assert indices.dtype == "INT32"

        def compute(layer: Layer, v: Tensor, at: Tensor) -> Tensor:
            assert bool(((at >= 0) & (at < v.shape[axis])).all()), "an index beyond its axis"
            if layer.num_elementwise_dims == 0:
                shape = (*v.shape[:axis], *at.shape, *v.shape[axis + 1 :])
                return v.index_select(axis, at.flatten().long()).reshape(shape)
            assert layer.num_elementwise_dims == axis == 1
            return torch.stack([row[index.long()] for row, index in zip(v, at, strict=True)])

        layer = self._layer(x.dtype, x.rank + indices.rank - 1, compute, x, indices)
        elementwise_changes_rank(layer)
        return layer

    def add_quantize(self, x: Recorded, scale: Recorded, dtype: Any) -> Layer:
        assert dtype.name == "FP8" and scale.dtype == "FLOAT" and scale.rank == 0

        def compute(_: Layer, v: Tensor, by: Tensor) -> Tensor:
            return to_e4m3(v.float() / by)

        return self._layer("FP8", x.rank, compute, x, scale)

    def add_dequantize(self, q: Recorded, scale: Recorded, dtype: Any) -> Layer:
        to = DTYPES[dtype.name]
        assert q.dtype in ("FP8", "INT8", "INT4") and scale.dtype in FLOATS

        def compute(layer: Layer, v: Tensor, by: Tensor) -> Tensor:
            by = by.float()
            if by.ndim == 2:  # blocks along axis 0
                assert layer.axis == 0 and v.shape[1] == by.shape[1]
                by = by.repeat_interleave(v.shape[0] // by.shape[0], dim=0)
                assert by.shape == v.shape
            elif by.ndim == 1:
                assert layer.axis is not None and len(by) == v.shape[layer.axis]
                by = by.view([-1 if i == layer.axis else 1 for i in range(v.ndim)])
            return (v.float() * by).to(to)

        return self._layer(dtype.name, q.rank, compute, q, scale)

    def add_rotary_embedding(
        self, x: Recorded, cos: Recorded, sin: Recorded, interleaved: bool, dim: int
    ) -> Layer:
        assert x.dtype == cos.dtype == sin.dtype and x.rank == 4

        def compute(_: Layer, v: Tensor, c: Tensor, s: Tensor, positions: Tensor) -> Tensor:
            assert positions.dtype == torch.int32 and c.shape[-1] == dim // 2
            c, s = (table[positions.long()].unsqueeze(1) for table in (c, s))  # [B, 1, T, dim / 2]
            turned, rest = v.split([dim, v.shape[-1] - dim], dim=-1)
            if interleaved:
                one, two = turned[..., 0::2], turned[..., 1::2]
                pairs = torch.stack([one * c - two * s, two * c + one * s], dim=-1)
                return torch.cat([pairs.flatten(-2), rest], dim=-1)
            one, two = turned.chunk(2, dim=-1)
            return torch.cat([one * c - two * s, two * c + one * s, rest], dim=-1)

        return self._layer(x.dtype, 4, compute, x, cos, sin)

    def add_kv_cache_update(
        self, cache: Recorded, update: Recorded, write_indices: Recorded, mode: Any
    ) -> Layer:
        assert mode.name == "LINEAR" and cache.dtype == update.dtype
        assert cache.name in self.inputs, "the cache is no network input"
        assert write_indices.dtype == "INT32" and write_indices.rank == 1

        def compute(_: Layer, kept: Tensor, new: Tensor, first: Tensor) -> Tensor:
            assert len(kept) == len(new) == len(first)
            for row, (values, start) in enumerate(zip(new, first.tolist(), strict=True)):
                count = min(values.shape[1], kept.shape[2] - start)
                kept[row, :, start : start + count] = values[:, :count]
            return kept

        return self._layer(cache.dtype, 4, compute, cache, update, write_indices)

    def add_attention_v2(
        self, q: Recorded, k: Recorded, v: Recorded, norm: Any, causal: Any
    ) -> Layer:
        assert norm.name == "SOFTMAX" and causal.name == "NONE"
        assert q.dtype == k.dtype == v.dtype and q.rank == k.rank == v.rank == 4

        def compute(layer: Layer, qs: Tensor, ks: Tensor, vs: Tensor, mask: Tensor) -> Tensor:
            assert mask.dtype == torch.bool
            assert layer.decomposable or qs.dtype != torch.float32, "no fused kernel"
            share = qs.shape[1] // ks.shape[1]
            ks, vs = (x.repeat_interleave(share, dim=1) for x in (ks, vs))
            scores = (qs @ ks.mT).float().masked_fill(~mask, float("-inf"))
            return torch.softmax(scores, dim=-1).to(vs.dtype) @ vs

        return self._layer(q.dtype, 4, compute, q, k, v)

    def add_dist_collective(
        self, x: Recorded, op: Any, reduction: Any, root: int, groups: Sequence[int]
    ) -> Layer:
        layer = self._layer(x.dtype, x.rank, lambda _, v: v, x)
        assert root == -1 and not groups
        if op.name == "ALL_GATHER":
            assert reduction.name == "NONE"
            layer.collective = lambda parts: [torch.cat(parts)] * len(parts)
        else:
            assert (op.name, reduction.name) == ("ALL_REDUCE", "SUM")
            layer.collective = lambda parts: [torch.stack(parts).sum(0)] * len(parts)
        return layer

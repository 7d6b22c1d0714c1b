"""The compiled kernels as Python sees them: one loaded model, and what is told to it.

The bounds that native/model.h asserts are checked here, before C++ is called. Knows pointers and
sizes; what a weight means is `packed_linear.py`'s.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_void_p
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from enginehouse.runtime.cpu.kernel_sizes import BYTES_PART
from enginehouse.runtime.cpu.packed_file import LayerShape, LinearShape
from enginehouse.runtime.cpu.structures import (
    DELTA_ARRAYS,
    FINAL_NORM,
    FORMS,
    INPUTS,
    LINEARS,
    NORMS,
    PARTS,
    STREAM_ARRAYS,
    TIMES,
    NativeLayer,
    NativeLinear,
    NativeStep,
    Shape,
    delta_sizes,
    input_sizes,
    linear_bytes,
    native_layer,
    norm_size,
    stream_sizes,
)
from enginehouse.runtime.errors import EngineError


class NativeModel:
    """One model in the compiled library. Not thread-safe; of no use after close()."""

    def __init__(self, library: Path, shape: Shape, layers: Sequence[LayerShape]) -> None:
        assert len(layers) == shape.layers
        assert all(each.place <= shape.kept_layers + shape.delta_layers for each in layers)
        self._functions = _functions(library)
        self._shape, self._layers = shape, layers
        self._kept: list[np.ndarray] = []  # what the library only points to
        self._num_logits = 0
        told = (NativeLayer * shape.layers)(*map(native_layer, layers))
        model = self._functions.eh_open(byref(shape), told)
        if not model:
            raise EngineError(
                "the memory for keys and values cannot be had; lower kv_cache_gib or max_seq_len"
            )
        self._model = c_void_p(model)
        self._free = weakref.finalize(self, self._functions.eh_close, self._model)

    def set_embedding(self, table: np.ndarray) -> None:
        """table: bfloat16 [vocab_size, hidden], as bytes."""
        assert len(table) >= self._shape.vocab * self._shape.hidden * 2
        self._functions.eh_embedding(self._model, self._keep(table))

    def set_rotary(self, index: int, cos: np.ndarray, sin: np.ndarray) -> None:
        """cos, sin: float32 [positions, pairs that are turned]. index: 0 global, 1 local, 2
        short.
        """
        assert cos.shape == sin.shape and cos.dtype == sin.dtype == np.float32
        tables = self._keep(cos), self._keep(sin)
        self._functions.eh_rotary(self._model, index, cos.shape[1], *tables)

    def set_rule(
        self, layer: int, scale: float, cap: float, kept: float, window: int, chunk: int, rope: int
    ) -> None:
        """cap, window, chunk: 0 for none. kept: the multiplier of keys and values in bytes, else 1.
        rope: 0 for the table that a step names, 1 for the local one, -1 for none.
        """
        self._functions.eh_rule(self._model, layer, scale, cap, kept, window, chunk, rope)

    def set_norm(
        self, layer: int, name: str, weight: np.ndarray, bias: np.ndarray | None = None
    ) -> None:
        """name: of NORMS, or FINAL_NORM; weight and, of a LayerNorm that has one, bias: float32
        [`norm_size`], as bytes.
        """
        which = len(NORMS) if name == FINAL_NORM else NORMS.index(name)
        num_bytes = 4 * norm_size(self._shape, self._layers[layer], name)
        assert len(weight) >= num_bytes
        assert bias is None or (self._shape.layer_norm and len(bias) >= num_bytes)
        pointers = (self._keep(weight), None if bias is None else self._keep(bias))
        self._functions.eh_norm(self._model, layer, which, *pointers)

    def set_router(
        self,
        layer: int,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        correction: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> None:
        """weight: float32 [experts, hidden], as bytes; bias of its logits, correction of its scores
        and scale of its shares, float32 [experts], where there are any.
        """
        experts, more = self._shape.experts, (bias, correction, scale)
        assert len(weight) >= 4 * experts * self._shape.hidden
        assert all(each is None or len(each) >= 4 * experts for each in more)
        arrays = (self._keep(weight), *map(self._kept_or_null, more))
        self._functions.eh_router(self._model, layer, *arrays)

    def set_layer(
        self,
        layer: int,
        sinks: np.ndarray | None = None,
        shared_gate: np.ndarray | None = None,
        multiplier: np.ndarray | None = None,
    ) -> None:
        """sinks: float32 [heads]; shared_gate: float32 [hidden]; multiplier: float32 [1]; as
        bytes.
        """
        sizes = (self._shape.heads, self._shape.hidden, 1)
        arrays = (sinks, shared_gate, multiplier)
        for array, size in zip(arrays, sizes, strict=True):
            assert array is None or len(array) >= 4 * size
        self._functions.eh_layer(self._model, layer, *map(self._kept_or_null, arrays))

    def set_inputs(self, table: np.ndarray, norm: np.ndarray) -> None:
        """Of what each layer gets of a token besides: `input_sizes`, as bytes: table in bfloat16,
        norm in float32.
        """
        sizes = input_sizes(self._shape)
        assert len(table) >= 2 * sizes["table"] and len(norm) >= 4 * sizes["norm"]
        self._functions.eh_inputs(self._model, self._keep(table), self._keep(norm))

    def set_delta(self, layer: int, **arrays: np.ndarray) -> None:
        """Of a layer with linear attention: `delta_sizes`, float32, as bytes."""
        for name, size in delta_sizes(self._shape).items():
            assert len(arrays[name]) >= 4 * size, name
        kept = (self._keep(arrays[name]) for name in DELTA_ARRAYS)
        self._functions.eh_delta(self._model, layer, *kept)

    def set_streams(self, layer: int, **arrays: np.ndarray) -> None:
        """Of a layer, with several residual streams: `stream_sizes`, float32, as bytes."""
        for name, size in stream_sizes(self._shape).items():
            assert len(arrays[name]) >= 4 * size, name
        kept = (self._keep(arrays[name]) for name in STREAM_ARRAYS)
        self._functions.eh_streams(self._model, layer, *kept)

    def set_linear(
        self,
        layer: int,
        name: str,
        shape: LinearShape,
        arrays: Mapping[str, np.ndarray],
        whose: int = 0,
    ) -> None:
        """arrays: weight, and what else the linear has of scales, zeros, counts, bias and factor,
        as bytes that are laid out as `packed_linear.py` says. whose: an expert, a head, or
        a stream but the first.
        """
        sizes = linear_bytes(shape)
        assert arrays.keys() <= sizes.keys() and "weight" in arrays
        assert ("scales" in arrays) == (shape.group > 0)
        assert ("counts" in arrays) == (shape.input in BYTES_PART)
        for part, array in arrays.items():
            assert len(array) >= sizes[part], part
        told = NativeLinear(
            FORMS.index(shape.form),
            *(shape.inputs, shape.out, shape.group),
            *(INPUTS.index(shape.input), int(shape.narrow_scales)),
            *(self._keep(arrays[part]) if part in arrays else None for part in PARTS),
        )
        self._functions.eh_linear(self._model, layer, LINEARS.index(name), whose, byref(told))

    def step(
        self,
        token_ids: Sequence[int],
        count: Sequence[int],
        start: Sequence[int],
        rope: Sequence[int],
        slots: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        """Keys, values, states and hidden states of a step's chunks: of each its number of tokens,
        first position, rotary table, the slot of its states and its blocks.
        """
        shape = self._shape
        offsets = [0, *accumulate(map(len, tables))][:-1]
        blocks = [block for table in tables for block in table]
        assert 0 < len(token_ids) == sum(count) <= shape.max_tokens and min(count) > 0
        assert 0 <= min(token_ids) and max(token_ids) < shape.vocab
        assert 0 <= min(blocks) and max(blocks) < shape.num_blocks
        for first, tokens, table in zip(start, count, tables, strict=True):
            assert first >= 0 and first + tokens <= len(table) * shape.block_size
        assert len(slots) == len(count) and 0 <= min(slots)
        assert max(slots) < max(1, shape.num_slots)
        assert not shape.num_slots or len(set(slots)) == len(slots)
        parts = (token_ids, count, start, rope, slots, offsets, blocks)
        together = _ints([number for part in parts for number in part])
        first = together.ctypes.data  # once: it takes as long as the rest
        places = accumulate((len(part) * together.itemsize for part in parts[:-1]), initial=first)
        self._functions.eh_step(self._model, byref(NativeStep(len(count), len(token_ids), *places)))

    @property
    def vocab_size(self) -> int:
        return int(self._shape.vocab)

    def logits(self, rows: Sequence[int]) -> None:
        """Compute those of the last step's rows: what `sample`, `score` and `values` are of."""
        assert 0 < len(rows) and 0 <= min(rows) and max(rows) < self._shape.max_tokens >= len(rows)
        array = _ints(rows)
        self._found = self._functions.eh_logits(self._model, array.ctypes.data, len(rows))
        self._num_logits = len(rows)

    def hidden_states(self, rows: Sequence[int]) -> np.ndarray:
        """Behind the last norm, of the last step's rows: float32 [rows, normed]."""
        assert 0 < len(rows) and 0 <= min(rows) and max(rows) < self._shape.max_tokens
        array, out = _ints(rows), np.empty((len(rows), self._shape.normed), np.float32)
        self._functions.eh_hidden(self._model, array.ctypes.data, len(rows), out.ctypes.data)
        return out

    @property
    def values(self) -> np.ndarray:
        """float32 [rows, vocab_size]: the last logits, where the library keeps them."""
        width = self._functions.eh_stride(self._model)
        return np.ctypeslib.as_array(self._found, (self._num_logits, width))[:, : self.vocab_size]

    def sample(self, choices: ctypes.Array[Any], rows: Sequence[int]) -> None:
        """Choose by `sampler.Choice`s, of these rows of the last logits."""
        assert len(set(rows)) == len(choices) and (not rows or min(rows) >= 0)
        assert max(rows, default=0) < self._num_logits
        self._functions.eh_sample(self._model, choices, len(choices))

    def score(self, tolds: ctypes.Array[Any]) -> None:
        """Fill `sampler.Told`s, of the last logits' first rows."""
        assert len(tolds) <= self._num_logits
        self._functions.eh_score(self._model, tolds, len(tolds))

    def seconds(self) -> dict[str, float]:
        """By part of a step, what it took since the model was opened."""
        out = np.zeros(len(TIMES))
        self._functions.eh_seconds(self._model, out.ctypes.data)
        return dict(zip(TIMES, out.tolist(), strict=True))

    def close(self) -> None:
        self._free()
        self._kept.clear()

    def _kept_or_null(self, array: np.ndarray | None) -> c_void_p | None:
        return None if array is None else self._keep(array)

    def _keep(self, array: np.ndarray) -> c_void_p:
        self._kept.append(array)
        return c_void_p(array.ctypes.data)


def _functions(library: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(library))
    except OSError as error:
        raise EngineError(
            f"{library} cannot be loaded: {error}; delete it, and it is made anew"
        ) from None
    pointer, number = c_void_p, c_int
    functions.eh_open.argtypes = [POINTER(Shape), POINTER(NativeLayer)]
    functions.eh_open.restype = pointer
    functions.eh_logits.argtypes = [pointer, pointer, number]
    functions.eh_logits.restype = POINTER(c_float)
    functions.eh_stride.argtypes, functions.eh_stride.restype = [pointer], number
    signatures: dict[str, list[Any]] = {
        "eh_close": [],
        "eh_step": [POINTER(NativeStep)],
        "eh_hidden": [pointer, number, pointer],
        "eh_seconds": [pointer],
        "eh_sample": [pointer, number],
        "eh_score": [pointer, number],
        "eh_embedding": [pointer],
        "eh_rotary": [number, number, pointer, pointer],
        "eh_rule": [number] + [c_float] * 3 + [number] * 3,
        "eh_norm": [number, number, pointer, pointer],
        "eh_router": [number] + [pointer] * 4,
        "eh_layer": [number] + [pointer] * 3,
        "eh_inputs": [pointer, pointer],
        "eh_delta": [number] + [pointer] * 4,
        "eh_streams": [number] + [pointer] * 4,
        "eh_linear": [number] * 3 + [POINTER(NativeLinear)],
    }
    for name, arguments in signatures.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = [pointer, *arguments], None
    return functions


def _ints(values: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)

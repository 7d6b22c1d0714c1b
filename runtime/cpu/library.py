"""The compiled kernels as Python sees them: their structures, and one loaded model.

The bounds that native/model.h asserts are checked here, before C++ is called. Knows pointers and
sizes; what a weight means is `packed_model.py`'s.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginehouse.runtime.errors import EngineError

LINEARS = ("qkv", "dense", "fc_gate", "proj", "lm_head")
NORMS = ("input_", "post_", "pre_feedforward_", "post_feedforward_", "attention.q_", "attention.k_")
FINAL_NORM = "ln_f"

_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_size", "rotary", "inner", "vocab")
_ROOM = ("num_blocks", "block_size", "max_tokens", "threads")
_INTS = (*_SIZES, *_ROOM, "gelu", "norm_sublayers")
_ARRAYS = ("token_ids", "count", "start", "rope", "table_offset", "tables")


class Shape(ctypes.Structure):
    """native/model.h's Shape: the model's sizes, and the room that it gets."""

    _fields_ = [
        *((name, c_int) for name in _INTS),
        *((name, c_float) for name in ("epsilon", "embedding_scale", "logits_cap")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("chunks", "tokens")),
        *((name, c_void_p) for name in _ARRAYS),
    ]


class NativeModel:
    """One model in the compiled library. Not thread-safe; of no use after close()."""

    def __init__(self, library: Path, shape: Shape) -> None:
        self._functions = _functions(library)
        self._shape = shape
        self._kept: list[Tensor] = []  # what the library only points to
        model = self._functions.eh_open(byref(shape))
        if not model:
            raise EngineError(
                "the memory for keys and values cannot be had; lower kv_cache_gib or max_seq_len"
            )
        self._model = c_void_p(model)
        self._free = weakref.finalize(self, self._functions.eh_close, self._model)

    def set_embedding(self, table: Tensor) -> None:
        """table: bfloat16 [vocab_size, hidden]."""
        assert table.shape == (self._shape.vocab, self._shape.hidden)
        self._functions.eh_embedding(self._model, self._keep(table, torch.bfloat16))

    def set_rotary(self, index: int, cos: Tensor, sin: Tensor) -> None:
        """cos, sin: float32 [positions, rotary / 2]. index: 0 global, 1 local, 2 short."""
        assert cos.shape == sin.shape and cos.shape[1] * 2 == self._shape.rotary
        pointers = [self._keep(table, torch.float32) for table in (cos, sin)]
        self._functions.eh_rotary(self._model, index, *pointers)

    def set_rule(
        self, layer: int, scale: float, cap: float | None, window: int | None, local_rope: bool
    ) -> None:
        self._functions.eh_rule(self._model, layer, scale, cap or 0.0, window or 0, int(local_rope))

    def set_norm(self, layer: int, name: str, weight: Tensor) -> None:
        """name: of NORMS, or FINAL_NORM; weight: [hidden] or [head_size]."""
        which = len(NORMS) if name == FINAL_NORM else NORMS.index(name)
        weight = weight.float().contiguous()
        pointer, count = c_void_p(weight.data_ptr()), weight.numel()
        self._functions.eh_norm(self._model, layer, which, pointer, count)

    def set_int4(
        self,
        layer: int,
        name: str,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        """q: int8 [out, in] in [-8, 7]; scale, zero: float32 [out, groups]; bias: float32 [out];
        factor: float32 [in].
        """
        out, size = q.shape
        group = size // scale.shape[1]
        assert q.dtype == torch.int8 and scale.shape[0] == out and group * scale.shape[1] == size
        assert zero is None or zero.shape == scale.shape
        tensors = [q.contiguous(), *_floats(scale, zero, bias, factor)]
        self._functions.eh_int4(
            self._model, layer, LINEARS.index(name), *map(_pointer, tensors), out, size, group
        )

    def set_bf16(
        self, layer: int, name: str, weight: Tensor, bias: Tensor | None, factor: Tensor | None
    ) -> None:
        """weight: bfloat16 [out, in]; bias, factor: as of `set_int4`."""
        assert weight.dtype == torch.bfloat16
        out, size = weight.shape
        tensors = [weight.contiguous(), *_floats(bias, factor)]
        self._functions.eh_bf16(
            self._model, layer, LINEARS.index(name), *map(_pointer, tensors), out, size
        )

    def step(
        self,
        token_ids: Sequence[int],
        count: Sequence[int],
        start: Sequence[int],
        rope: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        """Keys, values and hidden states of a step's chunks: of each its number of tokens, first
        position, rotary table and blocks.
        """
        shape = self._shape
        offsets = np.cumsum([0, *map(len, tables)])[:-1]
        blocks = [block for table in tables for block in table]
        assert 0 < len(token_ids) == sum(count) <= shape.max_tokens and min(count) > 0
        assert 0 <= min(token_ids) and max(token_ids) < shape.vocab
        assert 0 <= min(blocks) and max(blocks) < shape.num_blocks
        for first, tokens, table in zip(start, count, tables, strict=True):
            assert first >= 0 and first + tokens <= len(table) * shape.block_size
        arrays = [_ints(values) for values in (token_ids, count, start, rope, offsets, blocks)]
        pointers = (array.ctypes.data for array in arrays)
        self._functions.eh_step(self._model, byref(_Step(len(count), len(token_ids), *pointers)))

    def logits(self, rows: Sequence[int]) -> Tensor:
        """float32 [rows, vocab_size] of the last step's rows."""
        out = torch.empty(len(rows), self._shape.vocab)
        assert not rows or (0 <= min(rows) and max(rows) < self._shape.max_tokens >= len(rows))
        if rows:
            array, pointer = _ints(rows), c_void_p(out.data_ptr())
            self._functions.eh_logits(self._model, array.ctypes.data, len(rows), pointer)
        return out

    def close(self) -> None:
        self._free()
        self._kept.clear()

    def _keep(self, tensor: Tensor, dtype: torch.dtype) -> c_void_p:
        self._kept.append(tensor.to(dtype).contiguous())
        return c_void_p(self._kept[-1].data_ptr())


def _functions(library: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(library))
    except OSError as error:
        raise EngineError(
            f"{library} cannot be loaded: {error}; delete it, and it is made anew"
        ) from None
    pointer, number = c_void_p, c_int
    functions.eh_open.argtypes, functions.eh_open.restype = [POINTER(Shape)], pointer
    signatures: dict[str, list[Any]] = {
        "eh_close": [],
        "eh_step": [POINTER(_Step)],
        "eh_logits": [pointer, number, pointer],
        "eh_embedding": [pointer],
        "eh_rotary": [number, pointer, pointer],
        "eh_rule": [number, c_float, c_float, number, number],
        "eh_norm": [number, number, pointer, number],
        "eh_int4": [number] * 2 + [pointer] * 5 + [number] * 3,
        "eh_bf16": [number] * 2 + [pointer] * 3 + [number] * 2,
    }
    for name, arguments in signatures.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = [pointer, *arguments], None
    return functions


def _ints(values: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float().contiguous() for tensor in tensors]


def _pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())

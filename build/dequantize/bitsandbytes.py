"""bitsandbytes: 4 bits that point into a table of 16 numbers, and 8 bits with a scale for each row.

Source: bitsandbytes 0.50, functional.py (QuantState.as_dict, dequantize_4bit), nn/modules.py
(Linear8bitLt); Dettmers et al., 2023 (QLoRA), section 3: NF4, and scales that are quantised too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import check_shape, found, matrix, read_scale
from enginehouse.build.source import TensorSource
from enginehouse.runtime.errors import CheckpointError

_INT8_MAX = 127
_MOST_STATE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TableForm:
    """NF4 or FP4. weight: bytes in any dtype, [n / 2, 1] or [1, n / 2] of uint8, the first of two
    elements in the high nibble, rows one after the other; weight.quant_map float32 [16], what a
    nibble means; weight.absmax float32 [n / blocksize], its scales; weight.quant_state.* JSON.

    Where the scales are quantised too, absmax is uint8 and points into weight.nested_quant_map
    [256], with weight.nested_absmax for each nested_blocksize of them; nested_offset is added.
    """

    kind: str  # "nf4" or "fp4"
    name: str
    marker: str = ".weight.absmax"
    weight: str = ".weight"

    @property
    def endings(self) -> tuple[str, ...]:
        words = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        return ".weight", self._state, *(f".weight.{word}" for word in words)

    @property
    def _state(self) -> str:
        return f".weight.quant_state.bitsandbytes__{self.kind}"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        state = self._read_state(source, module)
        infos, shape = source.infos, state["shape"]
        count, size = prod(shape), state["blocksize"]
        num_bytes = prod(found(infos, f"{module}.weight", self.name))
        num_bytes *= infos[f"{module}.weight"].dtype.itemsize
        if 2 * num_bytes != count:
            raise CheckpointError(
                f"{module}.weight has {num_bytes} bytes; its quant_state says {list(shape)}, half "
                "a byte each: download the checkpoint again"
            )
        blocks = -(-count // size)
        found(infos, f"{module}.weight.quant_map", self.name)
        check_shape(infos, f"{module}.weight.quant_map", (16,))
        check_shape(infos, f"{module}.weight.absmax", (blocks,))
        if infos[f"{module}.weight.absmax"].dtype == torch.uint8:
            found(infos, f"{module}.weight.nested_quant_map", self.name)
            found(infos, f"{module}.weight.nested_absmax", self.name)
            check_shape(infos, f"{module}.weight.nested_quant_map", (256,))
            nested = -(-blocks // state["nested_blocksize"])
            check_shape(infos, f"{module}.weight.nested_absmax", (nested,))
        out_features, in_features = shape
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        shape = self.shape(source, module)
        state = self._read_state(source, module)
        table = read_scale(source, f"{module}.weight.quant_map")
        packed = source.read(f"{module}.weight").view(-1).view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).view(-1)
        size = min(state["blocksize"], len(codes))
        scale = self._scales(source, module, state).repeat_interleave(size)
        return table[codes.int()].mul_(scale[: len(codes)]).view(shape)

    def _scales(self, source: TensorSource, module: str, state: dict[str, Any]) -> Tensor:
        """float32, one for each block."""
        name = f"{module}.weight.absmax"
        if source.infos[name].dtype != torch.uint8:
            return read_scale(source, name)
        codes = source.read(name).int()
        nested = read_scale(source, f"{module}.weight.nested_absmax")
        size = min(state["nested_blocksize"], len(codes))
        each = nested.repeat_interleave(size)[: len(codes)]
        table = read_scale(source, f"{module}.weight.nested_quant_map")
        return (table[codes] * each).add_(state["nested_offset"])

    def _read_state(self, source: TensorSource, module: str) -> dict[str, Any]:
        """What is said beside the tensors: shape, blocksize, and of scales that are quantised."""
        name = module + self._state
        size = prod(found(source.infos, name, self.name, torch.uint8))
        try:
            if size > _MOST_STATE_BYTES:
                raise ValueError
            state: dict[str, Any] = json.loads(bytes(source.read(name).tolist()))
            sizes = [*state["shape"], state["blocksize"]]
            if source.infos[f"{module}.weight.absmax"].dtype == torch.uint8:
                sizes.append(state["nested_blocksize"])
                state["nested_offset"] = float(state["nested_offset"])
            if len(state["shape"]) != 2 or not all(type(n) is int and n > 0 for n in sizes):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{name} is not what bitsandbytes writes (JSON with shape and blocksize, and "
                "nested_blocksize and nested_offset where scales are bytes): download the "
                "checkpoint again"
            ) from None
        return state


@dataclass(frozen=True, slots=True)
class RowInt8Form:
    """LLM.int8(): weight int8 [out, in]; SCB float32 [out], the largest magnitude of each row,
    which 127 stands for; weight_format 0 for rows in order.
    """

    name: str = "bitsandbytes INT8"
    marker: str = ".SCB"
    endings: tuple[str, ...] = (".weight", ".SCB", ".weight_format")
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        infos = source.infos
        out_features, in_features = matrix(infos, f"{module}.weight", self.name, torch.int8)
        found(infos, f"{module}.SCB", self.name)
        check_shape(infos, f"{module}.SCB", (out_features,))
        check_shape(infos, f"{module}.weight_format", (), (1,))
        return out_features, in_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        self.shape(source, module)
        name = f"{module}.weight_format"
        if name in source.infos and source.read(name).any():
            raise CheckpointError(
                f"{name} is {int(source.read(name))}; wanted 0, rows in order: save the model "
                "again with a bitsandbytes that has no other"
            )
        scale = read_scale(source, f"{module}.SCB") / _INT8_MAX
        return source.read(f"{module}.weight").float().mul_(scale.view(-1, 1))

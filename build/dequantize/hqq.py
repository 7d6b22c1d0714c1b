"""HQQ: integers of a group along the inputs or the outputs, packed by halves, quarters and so on.

weight = (q - zero) * scale, laid out as [groups, group_size] (axis 1) or [group_size, groups] (axis
0) before it takes its shape; zero and scale are floats. What a module is, its own tensors say.
Source: hqq 0.2.8, core/quantize.py (Quantizer.dequantize, HQQLinear.state_dict), core/bitpack.py
and core/utils.py (encode_safetensor_type).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import check_shape, found, read_scale
from enginehouse.build.source import TensorSource
from enginehouse.runtime.errors import CheckpointError

_MOST_NUMBERS = 64  # of a tensor that says one thing of a module


class _Packing(NamedTuple):
    """A word of `dtype` holds `parts` integers of `bits`, the first in the highest of those bits:
    of part after part of the rows, each as many as the words have.
    """

    bits: int
    parts: int
    dtype: torch.dtype


_PACKINGS = {
    "8bit_u8": _Packing(8, 1, torch.uint8),
    "4bit_u8": _Packing(4, 2, torch.uint8),
    "3bit_32": _Packing(3, 10, torch.int32),
    "2bit_u8": _Packing(2, 4, torch.uint8),
    "1bit_u8": _Packing(1, 8, torch.uint8),
}


class _Said(NamedTuple):
    """What a module's small tensors say. grid: the shape of its integers before they are the
    weight's.
    """

    shape: tuple[int, int]
    packing: _Packing
    axis: int
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class HqqForm:
    """W_q: words [rows / parts, columns] in their own dtype or, with the same bytes, a float; scale
    and zero [groups, 1] for axis 1, [1, groups] for axis 0; shape [2], and nbits, group_size, axis
    and packing.
    """

    name: str = "HQQ"
    marker: str = ".W_q"
    endings: tuple[str, ...] = tuple(
        f".{word}"
        for word in (
            *("W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing"),
            *("unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"),
            *("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
            *("optimize", "round_zero"),
        )
    )
    weight: str = ".weight"

    def shape(self, source: TensorSource, module: str) -> tuple[int, int]:
        said, infos = self._said(source, module), source.infos
        stored = found(infos, f"{module}.W_q", self.name)
        rows, columns = said.grid
        words = -(-rows // said.packing.parts) * columns * said.packing.dtype.itemsize
        num_bytes = prod(stored) * infos[f"{module}.W_q"].dtype.itemsize
        if num_bytes != words or len(stored) != 2:
            raise CheckpointError(
                f"{module}.W_q has {num_bytes} bytes in shape {list(stored)}; what is said of it "
                f"({list(said.shape)} in groups, {said.packing.bits} bits) takes {words}: download "
                "the checkpoint again"
            )
        wanted = (rows, 1) if said.axis == 1 else (1, columns)
        for word in ("scale", "zero"):
            found(infos, f"{module}.{word}", self.name)
            check_shape(infos, f"{module}.{word}", wanted)
        return said.shape

    def read(self, source: TensorSource, module: str) -> Tensor:
        self.shape(source, module)
        said = self._said(source, module)
        rows, columns = said.grid
        bits, parts, dtype = said.packing
        words = source.read(f"{module}.W_q").view(-1).view(dtype).view(-1, columns)
        shifts = [(parts - 1 - part) * bits for part in range(parts)]
        q = torch.cat([words >> shift & (1 << bits) - 1 for shift in shifts])[:rows].float()
        zero, scale = (read_scale(source, f"{module}.{word}") for word in ("zero", "scale"))
        return q.sub_(zero).mul_(scale).view(said.shape)

    def _said(self, source: TensorSource, module: str) -> _Said:
        """CheckpointError for what is missing, of no sense, or not read."""

        def numbers(word: str) -> list[int]:
            name = f"{module}.{word}"
            shape = found(source.infos, name, self.name)
            if prod(shape) > _MOST_NUMBERS or source.infos[name].dtype.is_floating_point:
                raise CheckpointError(
                    f"{name} has shape {list(shape)} and dtype {source.infos[name].dtype}; wanted "
                    f"an integer or a few, as HQQ stores it: download the checkpoint again"
                )
            return [int(number) for number in source.read(name).view(-1).tolist()]

        for word in ("quant_scale", "quant_zero"):
            if f"{module}.{word}" in source.infos and any(numbers(word)):
                raise CheckpointError(
                    f"{module}.{word} says that scales are quantised too, which is not read: save "
                    "the model again with quant_scale=False and quant_zero=False"
                )
        packing = "".join(map(chr, (n for n in numbers("packing") if 0 < n < 128)))
        shape, axis = numbers("shape"), numbers("axis")
        if packing not in _PACKINGS or axis not in ([0], [1]) or len(shape) != 2:
            raise CheckpointError(
                f"{module} has packing={packing!r}, axis={axis} and shape={shape}; wanted one of "
                f"{', '.join(_PACKINGS)}, 0 or 1, and two numbers: download the checkpoint again"
            )
        out_features, in_features = shape
        size = in_features if axis == [1] else out_features
        if f"{module}.group_size" in source.infos:
            (size,) = numbers("group_size")[:1] or (0,)
        if min(out_features, in_features, size) < 1 or out_features * in_features % size:
            raise CheckpointError(
                f"{module} has shape {shape} and group_size={size}, which does not divide it: "
                "download the checkpoint again"
            )
        groups = out_features * in_features // size
        grid = (groups, size) if axis == [1] else (size, groups)
        return _Said((out_features, in_features), _PACKINGS[packing], axis[0], grid)

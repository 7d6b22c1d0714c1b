"""A tensor a few rows at a time: what is read, changed and written so never leaves the cache.

Memory that was just used is used again for the next piece, where a whole tensor would take fresh
pages from the kernel, which cost more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.families.rows import TensorRow
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.source import SourceCheckpoint

_ELEMENTS = 1 << 20


class Pieces(NamedTuple):
    """shape: of the whole. parts: it, in order, cut along dim 0; to be gone through once."""

    shape: tuple[int, ...]
    parts: Iterator[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Pieces:
        return cls(tuple(tensor.shape), iter([tensor]))

    def whole(self) -> Tensor:
        parts = list(self.parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def can_be_cut(row: TensorRow, source: SourceCheckpoint) -> bool:
    """Whether a row's tensor is the rows of its sources and nothing else; in pairs, as INT4 packs
    two rows. Of a source without weights, whether it would be.
    """
    plain = row.recipe == "join" and source.rows is None
    if not plain or not source.has_weights:
        return plain
    shapes = [source.tensors.infos[name].shape for name in row.sources]
    return all(len(shape) == 2 and shape[0] % 2 == 0 for shape in shapes)


def read_pieces(row: TensorRow, source: SourceCheckpoint) -> Pieces:
    """The tensor of a row that can be cut, in the source's dtype; each piece of an even height.

    Raises QuantizationError at a NaN or infinity, when its piece is come to.
    """
    shapes = [source.tensors.infos[name].shape for name in row.sources]
    return Pieces((sum(shape[0] for shape in shapes), *shapes[0][1:]), _read(row, source))


def _read(row: TensorRow, source: SourceCheckpoint) -> Iterator[Tensor]:
    for name in row.sources:
        height, *rest = source.tensors.infos[name].shape
        step = 2 * max(1, _ELEMENTS // (2 * prod(rest)))
        for start in range(0, height, step):
            piece = source.tensors.read(name, slice(start, min(start + step, height)))
            check_finite(name, piece)
            yield piece

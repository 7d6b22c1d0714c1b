"""A linear's weights -> its arrays, as the kernels read them.

They stand in blocks of 32 outputs, [out / 32, ...], in which 16 outputs are the lanes of a vector:
  bf16  [inputs / 2][2][16] words of two inputs, each eight inputs in the order 0 2 4 6 1 3 5 7
  int4  [inputs / 8][2][16] words of eight inputs: q + 8 of the first four in the low nibbles of
        its bytes, of the others in the high ones
  int8  [inputs / 4][2][16] words of four inputs: q + 128
  e4m3  the same, of its bytes
Read as 16 bits at a time, words of nibbles and of bytes yield the inputs in the order of bf16's:
one order of activations serves all. Scales, zeros: [groups][32] a block; counts, int16
[inputs / part][32]: the sum of each part's q, for activations that are rounded to bytes with an
offset.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.cpu.kernel_sizes import BYTES_PART, COLS, LANES, STEP
from enginehouse.runtime.cpu.linear_forms import LinearWeights
from enginehouse.runtime.cpu.packed_file import LinearShape

Arrays = dict[str, tuple[str, Tensor]]  # of `structures.PARTS`: a dtype of the file, and the values

_PAIRS = [0, 2, 4, 6, 1, 3, 5, 7]


def packed_linear(linear: LinearWeights) -> tuple[LinearShape, Arrays]:
    """Outputs are padded with zeros to whole blocks, inputs to whole steps."""
    weight, scale = linear.weight, linear.scale
    out, inputs = (size + -size % m for size, m in zip(weight.shape, (COLS, STEP), strict=True))
    weight = functional.pad(weight, [0, inputs - weight.shape[1], 0, out - weight.shape[0]])
    arrays = {"weight": _WORDS[linear.form](weight)}
    group, narrow = 0, False
    if scale is not None:
        narrow = scale.dtype == torch.bfloat16
        arrays["scales"] = "BF16" if narrow else "F32", _in_blocks(scale, out)
        groups = scale.shape[1]  # one of all inputs has the padding too
        group = inputs if groups == 1 else linear.weight.shape[1] // groups
    if part := BYTES_PART.get(linear.input):
        counts = weight.view(out, -1, part).sum(-1, dtype=torch.int16)
        arrays["counts"] = "I16", _in_blocks(counts, out)
    if linear.zero is not None:
        arrays["zeros"] = "F32", _in_blocks(linear.zero, out)
    if linear.bias is not None:
        arrays["bias"] = "F32", _padded(linear.bias, out)
    if linear.factor is not None:
        arrays["factor"] = "F32", _padded(linear.factor, inputs)
    return LinearShape(linear.form, out, inputs, group, linear.input, narrow), arrays


def packed_linears(linears: list[LinearWeights]) -> tuple[LinearShape, Arrays]:
    """Of one shape: what each has of an array follows that of the one before."""
    packed = [packed_linear(linear) for linear in linears]
    shape, arrays = packed[0]
    assert all(other == shape for other, _ in packed)
    together = (
        (part, dtype, torch.cat([array[part][1].flatten() for _, array in packed]))
        for part, (dtype, _) in arrays.items()
    )
    return shape, {part: (dtype, values) for part, dtype, values in together}


def whole_vectors(rows: Tensor) -> Tensor:
    """[..., width], zeros behind each row up to a multiple of 16; rows itself where it has one."""
    padding = -rows.shape[-1] % LANES
    return functional.pad(rows, [0, padding]) if padding else rows


def array_of(dtype: str, values: Tensor) -> np.ndarray:
    """The bytes of values, in a dtype of the file."""
    array: np.ndarray = values.to(_DTYPES[dtype]).contiguous().view(torch.uint8).numpy()
    return array


def _padded(values: Tensor, size: int) -> Tensor:
    return functional.pad(values.float(), [0, size - len(values)])


def _in_blocks(values: Tensor, out: int) -> Tensor:
    """[rows, n] -> [out / 32, n, 32], rows padded with zeros."""
    blocks: Tensor = functional.pad(values, [0, 0, 0, out - len(values)]).unflatten(0, (-1, COLS))
    return blocks.transpose(1, 2)


def _words(values: Tensor, each: int) -> Tensor:
    """[out, n] -> [out / 32, n / each, 2, 16, each]: of every output `each` that follow."""
    parts: Tensor = values.unflatten(1, (-1, each)).unflatten(0, (-1, 2, LANES))
    return parts.permute(0, 3, 1, 2, 4)


def _int4_words(q: Tensor) -> tuple[str, Tensor]:
    nibbles = (q + 8).view(torch.uint8).unflatten(1, (-1, 2, 4))
    return "U8", _words((nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1), 4)


def _int8_words(q: Tensor) -> tuple[str, Tensor]:
    return "U8", _words(q.view(torch.uint8) ^ 128, 4)


def _bf16_words(weight: Tensor) -> tuple[str, Tensor]:
    ordered = weight.to(torch.bfloat16).unflatten(1, (-1, 8))[:, :, _PAIRS].flatten(1)
    return "BF16", _words(ordered, 2)


def _e4m3_words(codes: Tensor) -> tuple[str, Tensor]:
    return "U8", _words(codes, 4)


_WORDS = {"bf16": _bf16_words, "int4": _int4_words, "int8": _int8_words, "e4m3": _e4m3_words}

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I16": torch.int16, "U8": torch.uint8}

"""One .gguf file: its header, parsed, and its tensors, dequantised row by row.

The header is parsed here in one pass of plain reads (gguf's own reader maps the file and takes
seconds on a vocabulary); the block formats are gguf's. This file does not know what the keys
and the tensors mean.
Source: GGUF specification, version 3.
"""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from enginehouse.build.hf_keys.config_values import refuse_pointers
from enginehouse.runtime.errors import CheckpointError

FloatArray = NDArray[np.float32]

_AGAIN = "download the file again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_CHUNK_ELEMENTS = 4 << 20  # dequantised at once: bounds what lives beside the result


class GgufTensor(NamedTuple):
    """shape: rows first, as torch has it. offset: of the first byte in the file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int


class GgufFile(NamedTuple):
    """The parsed header: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def key(self, name: str) -> str:
        """Of the model: under its architecture's name."""
        return f"{self.metadata.get('general.architecture')}.{name}"

    def of_model(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(self.key(name), default)


def read_gguf(path: Path) -> GgufFile:
    """Parse the header. CheckpointError when it is no GGUF 2 or 3, or shorter than it says."""
    refuse_pointers([path])
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (EOFError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} has a header that is truncated or damaged; {_AGAIN}"
        ) from None


def _parse(path: Path, file: BinaryIO, size: int) -> GgufFile:
    magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} begins with {magic!r}; wanted b'GGUF': it is no GGUF file")
    version = _scalar(file, "I")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; wanted 2 or 3, little-endian")
    num_tensors, num_keys = _scalar(file, "Q"), _scalar(file, "Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _string(file)
        metadata[key] = _value(file, _scalar(file, "I"))
    raw: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name, num_dims = _string(file), _scalar(file, "I")
        if num_dims > 8:
            raise EOFError
        dims = tuple(_scalar(file, "Q") for _ in range(num_dims))
        raw.append((name, dims[::-1], _scalar(file, "I"), _scalar(file, "Q")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise EOFError
    start = -(-file.tell() // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in raw:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(
                f"{path} holds tensor {name!r} of type {number}, unknown to gguf "
                "here; upgrade the gguf package"
            ) from None
        tensor = tensors[name] = GgufTensor(kind, shape, start + offset)
        if shape and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise CheckpointError(
                f"{path} holds tensor {name!r} with rows of {shape[-1]}, no multiple of "
                f"{kind.name}'s block; {_AGAIN}"
            )
        end = tensor.offset + prod(shape[:-1]) * _row_bytes(tensor)
        if end > size:
            raise CheckpointError(
                f"{path} has {size:,} bytes, tensor {name!r} ends at byte {end:,}: "
                f"it is truncated; {_AGAIN}"
            )
    return GgufFile(path, metadata, tensors)


def _read(file: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes; a count larger than the file is not even allocated."""
    if count > 1 << 20 and count > os.fstat(file.fileno()).st_size:
        raise EOFError
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", _read(file, struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return _read(file, _scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind in _SCALARS:
        return _scalar(file, _SCALARS[kind])
    if kind != _ARRAY:
        raise EOFError
    item_kind, count = _scalar(file, "I"), _scalar(file, "Q")
    if item_kind == _STRING:
        return [_string(file) for _ in range(count)]
    if item_kind not in _SCALARS:
        raise EOFError
    dtype = np.dtype("<" + _SCALARS[item_kind])
    return np.frombuffer(_read(file, count * dtype.itemsize), dtype=dtype).tolist()


def _row_bytes(tensor: GgufTensor) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    return (tensor.shape[-1] if tensor.shape else 1) // block * block_bytes


def read_rows(path: Path, name: str, tensor: GgufTensor, start: int, stop: int) -> FloatArray:
    """Rows [start, stop) in float32, read and dequantised some rows at a time.

    A vector is one row. `name` is for the errors: CheckpointError when the file has become
    shorter, or holds a type that gguf cannot dequantise.
    """
    width, row_bytes = tensor.shape[-1], _row_bytes(tensor)
    result = np.empty((stop - start, width), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // width)
    for row in range(start, stop, step):
        count = min(step, stop - row)
        try:
            data = np.fromfile(
                path, np.uint8, count * row_bytes, offset=tensor.offset + row * row_bytes
            )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if data.size < count * row_bytes:
            raise CheckpointError(f"{path} ends inside {name}; it changed: start again")
        try:
            values = gguf.dequantize(data.reshape(count, row_bytes), tensor.kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{path} holds {name} as {tensor.kind.name}, which cannot be "
                "dequantised here; give a file of another type (Q8_0, Q4_K_M, BF16)"
            ) from None
        result[row - start : row - start + count] = values
    return result

"""One safetensors file: its header, checked, and its bytes.

Nothing is mapped into memory: a tensor is read with `preadv` into a fresh buffer, so resident
memory is what the caller keeps, whatever the file's size. Where the bytes come from is a `Bytes`:
this disk, or whatever has them until the file is here. This file does not know checkpoints: neither
their other files nor what the tensors mean.
Source: safetensors format (8-byte little-endian length, JSON header, data).
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from enginehouse.build.hf_keys.config_values import refuse_pointers
from enginehouse.runtime.errors import CheckpointError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_MAX_HEADER_BYTES = 100_000_000
_MOST = 2**63 - 1  # of a size or a place


class Bytes(Protocol):
    """Who has a file's bytes. CheckpointError where they cannot be had; threads may ask."""

    def size(self, path: Path) -> int: ...

    def fill(self, path: Path, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""


class Disk:
    """The bytes of files on this disk."""

    def size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    def fill(self, path: Path, view: memoryview, offset: int) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                while view:
                    count = os.preadv(descriptor, [view], offset)
                    if count == 0:
                        raise CheckpointError(
                            f"{path} ends at byte {offset:,}, {len(view):,} bytes too early; "
                            "it changed while being read: start again"
                        )
                    view, offset = view[count:], offset + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


DISK = Disk()


class SafetensorsTensor(NamedTuple):
    """Where a tensor lies: offset is of its first byte in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    files: Bytes = DISK


def read_safetensors_header(path: Path, files: Bytes = DISK) -> dict[str, SafetensorsTensor]:
    """The tensors of one file, with everything about the header checked.

    Raises CheckpointError on a truncated file, a wrong header length, an unknown dtype, a size
    that disagrees with shape and dtype, and offsets that overlap or leave the file.
    """
    again = "download the file again"
    refuse_pointers([path])
    size = files.size(path)
    head = bytearray(min(size, 8))
    files.fill(path, memoryview(head), 0)
    length = int.from_bytes(head, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} says its header has {length:,} bytes, but the file has {size:,}: "
            f"it is truncated or no safetensors file; {again}"
        )
    text = bytearray(length)
    files.fill(path, memoryview(text), 8)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a header that is not JSON; {again}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object; {again}")
    header.pop("__metadata__", None)

    tensors: dict[str, SafetensorsTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, item in header.items():
        try:
            dtype_name, shape = str(item["dtype"]), tuple(int(n) for n in item["shape"])
            begin, end = (int(n) for n in item["data_offsets"])
            if max(map(abs, (begin, end, *shape))) > _MOST:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(
                f"{path} describes tensor {name!r} without dtype, shape and data_offsets; {again}"
            ) from None
        if dtype_name not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path} holds tensor {name!r} with dtype {dtype_name}; "
                f"wanted one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        dtype = SAFETENSORS_DTYPES[dtype_name]
        wanted = prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or end - begin != wanted:
            raise CheckpointError(
                f"{path} gives tensor {name!r} {end - begin:,} bytes; {dtype_name} "
                f"{list(shape)} takes {wanted:,}; {again}"
            )
        tensors[name] = SafetensorsTensor(path, dtype, shape, 8 + length + begin, files)
        spans.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            raise CheckpointError(
                f"{path} places tensor {name!r} at byte {begin:,}, inside another one; {again}"
            )
        position = end
    if 8 + length + position > size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, its header describes {8 + length + position:,}: "
            f"it is truncated; {again}"
        )
    return tensors


def read_tensor(tensor: SafetensorsTensor, rows: slice | None = None) -> torch.Tensor:
    """The tensor in memory of its own; `rows` reads only these rows of dim 0."""
    path, dtype, shape, offset, files = tensor
    if rows is not None:
        start, stop, step = rows.indices(shape[0])
        assert step == 1, "rows are read in one piece"
        stop = max(start, stop)
        offset += start * prod(shape[1:]) * dtype.itemsize
        shape = (stop - start, *shape[1:])
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    files.fill(path, buffer.numpy().data, offset)
    return buffer.view(dtype).reshape(shape)

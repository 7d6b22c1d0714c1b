"""Write one safetensors file whose tensors arrive in any order, without holding them.

The header is known from the plan before the first tensor is, so each tensor goes straight to
its place; a file that was begun with the same header is gone on with.
Source: the safetensors format (8-byte little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from enginehouse.build.convert.direct_file import BLOCK, DirectFile, Stream
from enginehouse.build.forms.weight_forms import OutputTensor

_DTYPE_WORDS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}
_READ_BYTES = 8 << 20


class Stored(NamedTuple):
    """A tensor on the disk: its file's name, its own, and the XXH3 (128 bit) of its bytes."""

    file: str
    name: str
    num_bytes: int
    digest: str


class RankFile:
    """A file of exactly the tensors in `table`, in the order of their dtypes' width, so that each
    is aligned to its element. Several threads may write, each its own tensors.
    """

    def __init__(
        self, path: Path, table: Mapping[str, OutputTensor], metadata: Mapping[str, str] = {}
    ) -> None:
        self.path = path
        self._table = table
        self._missing = set(table)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in sorted(table, key=lambda n: -getattr(torch, table[n].dtype).itemsize):
            tensor = table[name]
            start, end = end, end + tensor.num_bytes
            self._offsets[name] = start
            header[name] = {
                "dtype": _DTYPE_WORDS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % BLOCK)  # tensors of whole blocks lie on them
        head = struct.pack("<Q", len(text)) + text
        self._data_start = len(head)
        self._file = DirectFile(path)
        found = os.pread(self._file.descriptor, len(head), 0)
        if found != head or os.fstat(self._file.descriptor).st_size != len(head) + end:
            self._file.resize(0)
            stream = self._file.stream(0)
            stream.append(memoryview(head))
            stream.close()
            self._file.resize(len(head) + end)

    def write(self, name: str, tensor: Tensor) -> Stored:
        """Put a tensor in its place. Its dtype and shape are the table's."""
        writer = self.begin(name)
        writer.append(tensor)
        return writer.end()

    def begin(self, name: str) -> TensorWriter:
        """For a tensor that comes in pieces."""
        stream = self._file.stream(self._data_start + self._offsets[name])
        return TensorWriter(self, name, self._table[name], stream)

    def written(self, name: str) -> None:
        """The whole tensor is in its place."""
        self._missing.discard(name)

    def holds(self, stored: Stored) -> bool:
        """Whether the tensor is here as it was once written; if so, it need not be again."""
        if stored.name not in self._table:
            return False
        left = self._table[stored.name].num_bytes
        offset = self._data_start + self._offsets[stored.name]
        digest = xxh3_128()
        while left:
            data = os.pread(self._file.descriptor, min(left, _READ_BYTES), offset)
            digest.update(data)
            left, offset = left - len(data), offset + len(data)
        if digest.hexdigest() != stored.digest:
            return False
        self._missing.discard(stored.name)
        return True

    def take(self, path: Path, stored: Stored) -> bool:
        """Copy a tensor from a file of the same tensors; false where it, or the file's beginning,
        is not as it was once written.
        """
        if stored.name not in self._table:
            return False
        offset = self._data_start + self._offsets[stored.name]
        left, digest = self._table[stored.name].num_bytes, xxh3_128()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        stream = self._file.stream(offset)
        try:
            same = os.pread(descriptor, self._data_start, 0) == os.pread(
                self._file.descriptor, self._data_start, 0
            )
            while same and left and (data := os.pread(descriptor, min(left, _READ_BYTES), offset)):
                digest.update(data)
                stream.append(memoryview(data))
                left, offset = left - len(data), offset + len(data)
        finally:
            stream.close()
            os.close(descriptor)
        if not same or left or digest.hexdigest() != stored.digest:
            return False
        self._missing.discard(stored.name)
        return True

    def finish(self) -> None:
        """Every tensor was written: have them on the disk."""
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class TensorWriter:
    """One tensor of a rank file, its rows in order."""

    def __init__(self, file: RankFile, name: str, wanted: OutputTensor, stream: Stream) -> None:
        self._file, self._name, self._wanted, self._stream = file, name, wanted, stream
        self._num_bytes = 0
        self._digest = xxh3_128()

    def append(self, piece: Tensor) -> None:
        """The next rows, all of them or some."""
        dtype, shape = self._wanted
        found = str(piece.dtype).removeprefix("torch.")
        assert (found, piece.shape[1:]) == (dtype, shape[1:]), (self._name, piece, self._wanted)
        data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
        self._stream.append(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    def end(self) -> Stored:
        self._stream.close()
        assert self._num_bytes == self._wanted.num_bytes, (self._name, self._wanted)
        self._file.written(self._name)
        digest = self._digest.hexdigest()
        return Stored(self._file.path.name, self._name, self._num_bytes, digest)

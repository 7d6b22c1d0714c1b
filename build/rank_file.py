"""Write one safetensors file whose tensors arrive in any order, without holding them.

The header is known from the plan before the first tensor is, so each tensor goes straight to
its place; a file that was begun with the same header is gone on with.
Source: the safetensors format (8-byte little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from enginehouse.build.forms import OutputTensor
from enginehouse.runtime.errors import EnginehouseError

_DTYPE_WORDS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
}
_READ_BYTES = 8 << 20
# A page cache in large blocks looks for a block of each write's size. Up to eight pages the kernel
# has lists of them; beyond, a write takes several times as long.
_WRITE_BYTES = 32 << 10
_FLUSH_BYTES = 128 << 20


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
        # The kernel lets one thread at a time write to a file, and the others spin.
        self._writing = threading.Lock()
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushed: Future[None] | None = None
        self._unflushed = 0
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
        text += b" " * (-len(text) % 8)
        head = struct.pack("<Q", len(text)) + text
        self._data_start = len(head)
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            begun = os.pread(self._descriptor, len(head), 0) == head
            if not begun or os.fstat(self._descriptor).st_size != len(head) + end:
                os.ftruncate(self._descriptor, 0)
                self.put(memoryview(head), 0)
                os.ftruncate(self._descriptor, len(head) + end)
        except OSError as error:
            raise EnginehouseError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, name: str, tensor: Tensor) -> Stored:
        """Put a tensor in its place. Its dtype and shape are the table's."""
        writer = self.begin(name)
        writer.append(tensor)
        return writer.end()

    def begin(self, name: str) -> TensorWriter:
        """For a tensor that comes in pieces."""
        return TensorWriter(self, name, self._table[name], self._data_start + self._offsets[name])

    def put(self, data: memoryview, offset: int) -> None:
        """Write at a place in the file; EnginehouseError when that fails."""
        try:
            with self._writing:
                self._unflushed += len(data)
                while data:
                    written = os.pwrite(self._descriptor, data[:_WRITE_BYTES], offset)
                    data, offset = data[written:], offset + written
                self._flush()
        except OSError as error:
            raise EnginehouseError(f"{self.path} cannot be written: {error.strerror}") from None

    def _flush(self) -> None:
        """Have the disk begin before the last tensor comes. Raises OSError of the flush before."""
        if self._unflushed >= _FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            if self._flushed is not None:
                self._flushed.result()
            self._flushed = self._flusher.submit(os.fdatasync, self._descriptor)
            self._unflushed = 0

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
            data = os.pread(self._descriptor, min(left, _READ_BYTES), offset)
            digest.update(data)
            left, offset = left - len(data), offset + len(data)
        if digest.hexdigest() != stored.digest:
            return False
        self._missing.discard(stored.name)
        return True

    def finish(self) -> None:
        """Every tensor was written: have them on the disk."""
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
        try:
            if self._flushed is not None:
                self._flushed.result()
            os.fsync(self._descriptor)
        except OSError as error:
            raise EnginehouseError(f"{self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        self._flusher.shutdown()
        os.close(self._descriptor)


class TensorWriter:
    """One tensor of a rank file, its rows in order."""

    def __init__(self, file: RankFile, name: str, wanted: OutputTensor, offset: int) -> None:
        self._file, self._name, self._wanted = file, name, wanted
        self._start = self._offset = offset
        self._digest = xxh3_128()

    def append(self, piece: Tensor) -> None:
        """The next rows, all of them or some."""
        dtype, shape = self._wanted
        found = str(piece.dtype).removeprefix("torch.")
        assert (found, piece.shape[1:]) == (dtype, shape[1:]), (self._name, piece, self._wanted)
        data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
        self._file.put(data, self._offset)
        self._digest.update(data)
        self._offset += len(data)

    def end(self) -> Stored:
        num_bytes = self._offset - self._start
        assert num_bytes == self._wanted.num_bytes, (self._name, num_bytes, self._wanted)
        self._file.written(self._name)
        return Stored(self._file.path.name, self._name, num_bytes, self._digest.hexdigest())

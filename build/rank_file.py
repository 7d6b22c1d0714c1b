"""Write one safetensors file whose tensors arrive in any order, without holding them.

The header is known from the plan before the first tensor is, so each tensor goes straight to
its place. Source: the safetensors format (8-byte little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from enginehouse.build.forms import OutputTensor
from enginehouse.runtime.errors import EnginehouseError

_DTYPE_WORDS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
}


class RankFile:
    """A file of exactly the tensors in `table`; closing it checks that all were written.

    Tensors with wide elements come first, so that each is aligned to its element.
    """

    def __init__(self, path: Path, table: Mapping[str, OutputTensor]) -> None:
        self.path = path
        self._table = table
        self._missing = set(table)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {}
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
        self._data_start = 8 + len(text)
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._put(struct.pack("<Q", len(text)) + text, 0)
            os.truncate(self._descriptor, self._data_start + end)
        except OSError as error:
            raise EnginehouseError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, name: str, tensor: Tensor) -> int:
        """Put a tensor in its place; returns its bytes. Its dtype and shape are the table's."""
        wanted = self._table[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert (dtype, tuple(tensor.shape)) == (wanted.dtype, wanted.shape), (name, tensor, wanted)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._put(data, self._data_start + self._offsets[name])
        self._missing.discard(name)
        return len(data)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise EnginehouseError(f"{self.path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> RankFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
            os.fsync(self._descriptor)
        os.close(self._descriptor)

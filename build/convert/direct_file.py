"""A file that is written past the page cache, where the file system can do that.

A copy of what nobody reads soon would cost more than all else that a conversion does: pages for
it, and what else they displace. Blocks that are whole in the file go straight from memory to the
disk; what begins or ends within a block goes through the page cache, as does everything on a file
system without O_DIRECT.
Source: open(2), O_DIRECT: address, length and place in the file are multiples of the block size.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

from enginehouse.runtime.errors import EnginehouseError

BLOCK = 4096
_BUFFER_BYTES = 1 << 20
# The page cache looks for one block of memory of each write's size. Up to eight pages the kernel
# has lists of them; beyond, a write takes several times as long.
_CACHED_BYTES = 32 << 10
# O_DIRECT's refusals: of the file system, or of a block size that is larger than ours.
_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP)
_free_buffers: list[memoryview] = []  # of all files: a page that was used costs less than a new one


class DirectFile:
    """Opened for reading and writing, made if it is missing. Threads may write at once, each to a
    part of its own. Every call raises EnginehouseError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from None
        self._direct: int | None = None
        self.writers = ThreadPoolExecutor(2, "write")
        try:
            self._direct = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                os.close(self.descriptor)
                raise self._unwritable(error) from None

    def resize(self, num_bytes: int) -> None:
        """Cut it off there, or have zeros up to there."""
        try:
            os.ftruncate(self.descriptor, num_bytes)
        except OSError as error:
            raise self._unwritable(error) from None

    def stream(self, offset: int) -> Stream:
        """For bytes that come in pieces, from a place on."""
        return Stream(self, offset)

    def write(self, data: memoryview, offset: int) -> None:
        """Put bytes at a place, which is as far into a block as they are in memory."""
        try:
            head = min(-offset % BLOCK, len(data))
            whole = (len(data) - head) // BLOCK * BLOCK
            self._write_cached(data[:head], offset)
            self._write_direct(data[head : head + whole], offset + head)
            self._write_cached(data[head + whole :], offset + head + whole)
        except OSError as error:
            raise self._unwritable(error) from None

    def _write_direct(self, data: memoryview, offset: int) -> None:
        while data and self._direct is not None:
            try:
                written = os.pwrite(self._direct, data, offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                break
            if written % BLOCK:
                break
            data, offset = data[written:], offset + written
        self._write_cached(data, offset)

    def _write_cached(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self.descriptor, data[:_CACHED_BYTES], offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Have everything on the disk."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Also of streams that an error left open: no thread may write to what is closed."""
        self.writers.shutdown()
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def _unwritable(self, error: OSError) -> EnginehouseError:
        return EnginehouseError(f"{self.path} cannot be written: {error.strerror}")


class Stream:
    """Bytes one after another, gathered in memory that lies on blocks as they will in the file.
    While one buffer is filled the one before is written.
    """

    def __init__(self, file: DirectFile, offset: int) -> None:
        self._file = file
        self._place = offset // BLOCK * BLOCK  # of the buffer's first byte
        self._start = self._end = offset - self._place
        self._buffer = _take_buffer()
        self._written: Future[None] | None = None  # of the buffer before

    def append(self, data: memoryview) -> None:
        """The next bytes."""
        while data:
            count = min(len(data), _BUFFER_BYTES - self._end)
            self._buffer[self._end : self._end + count] = data[:count]
            data, self._end = data[count:], self._end + count
            if self._end == _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        if self._written is not None:
            self._written.result()
        full = self._buffer[self._start : self._end]
        place = self._place + self._start
        self._written = self._file.writers.submit(self._write, self._buffer, full, place)
        self._place, self._start, self._end = self._place + self._end, 0, 0
        self._buffer = _take_buffer()

    def _write(self, buffer: memoryview, full: memoryview, offset: int) -> None:
        self._file.write(full, offset)
        _free_buffers.append(buffer)

    def close(self) -> None:
        """Write what is left, and wait for it."""
        if self._written is not None:
            self._written.result()
        full = self._buffer[self._start : self._end]
        self._write(self._buffer, full, self._place + self._start)


def _take_buffer() -> memoryview:
    try:
        return _free_buffers.pop()
    except IndexError:
        return memoryview(mmap(-1, _BUFFER_BYTES))

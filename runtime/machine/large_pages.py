"""A file's bytes in memory of this process's own, in large pages.

What is mapped lies in pages of 4 KiB, which all who map it share; who reads through it looks up
thousands of them. Knows no format.
"""

from __future__ import annotations

import mmap
from io import BufferedReader
from pathlib import Path

from enginehouse.runtime.machine.cpu import free_memory

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST = 8 << 20  # bytes: less is soon looked up


def read_into_large_pages(file: BufferedReader, size: int) -> mmap.mmap | None:
    """The first `size` bytes of a file; None where the system has no large pages or not twice the
    memory, and for what is too small to gain by them. Raises OSError for a file that ends before.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _LEAST or not _are_there() or 2 * size > free_memory():
        return None
    room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        room.madvise(advice)
    except OSError:  # a kernel that was built without them
        room.close()
        return None
    file.seek(0)
    if (read := file.readinto(room)) < size:
        raise OSError(f"it ends after {read} of {size} bytes")
    return room


def _are_there() -> bool:
    try:
        return "[never]" not in _ENABLED.read_text()
    except OSError:
        return False

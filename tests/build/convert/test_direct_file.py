"""Files written past the page cache: the same bytes wherever they begin, and without O_DIRECT."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.build.convert import direct_file
from enginehouse.build.convert.direct_file import BLOCK, DirectFile
from enginehouse.runtime.errors import EnginehouseError

NOISE = os.urandom(3 << 20)
SIZES = st.lists(
    st.sampled_from([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 1 << 20, (1 << 20) + BLOCK, 1_300_001]),
    min_size=1,
    max_size=6,
)


def write_streams(path: Path, sizes: list[int], piece: int, first: int = 0) -> bytes:
    """A stream for each size, one after the other, by threads; what the file should be."""
    file = DirectFile(path)
    file.resize(first + sum(sizes))
    wanted = bytearray(first + sum(sizes))
    threads = []
    for number, size in enumerate(sizes):
        offset = first + sum(sizes[:number])
        data = NOISE[number : number + size]
        wanted[offset : offset + size] = data

        def write(data: bytes = data, offset: int = offset) -> None:
            stream = file.stream(offset)
            for start in range(0, len(data), piece):
                stream.append(memoryview(data)[start : start + piece])
            stream.close()

        threads.append(threading.Thread(target=write))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.sync()
    file.close()
    return bytes(wanted)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, piece=st.sampled_from([1000, 65536, 2_000_000]), first=st.integers(0, 5000))
def test_neighbours_meet_within_a_block(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], piece: int, first: int
) -> None:
    path = tmp_path_factory.mktemp("direct") / "file"
    assert write_streams(path, sizes, piece, first) == path.read_bytes()


def direct_writes(monkeypatch: pytest.MonkeyPatch, refusal: int | None) -> list[int]:
    """Bytes of each write past the page cache; they are refused with an errno instead."""
    seen: list[int] = []
    direct: set[int] = set()
    opened, written = os.open, os.pwrite

    def open_file(path: Any, flags: int, *mode: int) -> int:
        descriptor = opened(path, flags, *mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in direct:
            seen.append(len(data))
            if refusal is not None:
                raise OSError(refusal, os.strerror(refusal))
        return written(descriptor, data, offset)

    monkeypatch.setattr(direct_file.os, "open", open_file)
    monkeypatch.setattr(direct_file.os, "pwrite", write)
    return seen


def test_whole_blocks_are_written_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = direct_writes(monkeypatch, None)
    wanted = write_streams(tmp_path / "file", [1_300_001], 50_000, first=100)
    assert (tmp_path / "file").read_bytes() == wanted
    # but for the block it begins in and the one it ends in
    assert sum(seen) == (100 + 1_300_001) // BLOCK * BLOCK - BLOCK


def test_a_file_system_may_refuse_each_direct_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = direct_writes(monkeypatch, errno.EINVAL)
    wanted = write_streams(tmp_path / "file", [1_300_001, 77], 50_000)
    assert (tmp_path / "file").read_bytes() == wanted
    assert seen


def test_a_file_system_may_not_know_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *mode)

    monkeypatch.setattr(direct_file.os, "open", refuse)
    wanted = write_streams(tmp_path / "file", [1_300_001, 77], 50_000)
    assert (tmp_path / "file").read_bytes() == wanted


def test_a_full_disk_is_said_and_no_thread_writes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = direct_writes(monkeypatch, errno.ENOSPC)
    file = DirectFile(tmp_path / "file")
    stream = file.stream(0)
    with pytest.raises(EnginehouseError, match=r"file cannot be written: No space left on device"):
        for _ in range(3):
            stream.append(memoryview(NOISE))
    file.close()
    assert seen and not [each for each in threading.enumerate() if each.name.startswith("write")]

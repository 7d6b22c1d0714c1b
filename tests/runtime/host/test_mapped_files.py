"""An engine's files, written into, cut, replaced and removed under a host that maps them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.host.mapped_files import MappedFiles, mapped_below


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, MappedFiles]]:
    """A mapped file, by a link to its folder, beside one that is only read."""
    folder = tmp_path / "engine v2"
    folder.mkdir()
    path = folder / "packed.safetensors"
    path.write_bytes(b"w" * 8192)
    (folder / "tokenizer.json").write_bytes(b"{}")
    os.utime(path, ns=(0, 10**18))
    (tmp_path / "link").symlink_to(folder)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        files = MappedFiles(tmp_path / "link", 0.0)
        yield path, files
        files.close()


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def cut(path: Path) -> None:
    os.truncate(path, 100)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"another")
    other.replace(path)


@pytest.mark.parametrize("harm", [write_into, cut])
def test_what_is_written_into_is_noticed_by_its_name(
    mapped: tuple[Path, MappedFiles], harm: Callable[[Path], None]
) -> None:
    path, files = mapped
    files.check(5.0)
    harm(path)
    files.check(5.5)  # it looks once a second
    with pytest.raises(EngineError, match=f"^{path} was changed while it is served"):
        files.check(6.0)


@pytest.mark.parametrize("harm", [replace, Path.unlink])
def test_what_is_replaced_or_removed_stays_as_it_was(
    mapped: tuple[Path, MappedFiles], harm: Callable[[Path], None]
) -> None:
    path, files = mapped
    assert mapped_below(path.parent) == [path], "and nothing that is not mapped"
    (path.parent / "tokenizer.json").write_text("changed")
    harm(path)
    files.check(5.0)

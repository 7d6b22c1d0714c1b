from pathlib import Path

import pytest

from enginehouse.runtime.machine import large_pages
from enginehouse.runtime.machine.large_pages import read_into_large_pages

SIZE = (9 << 20) + 5  # bytes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(251)) * (SIZE // 251 + 1))
    return path


def has_large_pages() -> bool:
    path = large_pages._ENABLED
    return path.exists() and "[never]" not in path.read_text()


@pytest.mark.skipif(not has_large_pages(), reason="this system has no transparent large pages")
def test_what_is_read_is_the_file(file: Path) -> None:
    with file.open("rb") as opened:
        opened.read(8)  # as who looks at a header first
        room = read_into_large_pages(opened, SIZE)
    assert room is not None and len(room) == SIZE
    assert room[:] == file.read_bytes()[:SIZE]
    room.close()
    with file.open("rb") as opened, pytest.raises(OSError, match="it ends after .* bytes"):
        read_into_large_pages(opened, file.stat().st_size + 1)


def test_nothing_is_read_where_nothing_is_gained(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file.open("rb") as opened:
        assert read_into_large_pages(opened, 1 << 20) is None, "too small"
        with monkeypatch.context() as patched:
            patched.setattr(large_pages, "free_memory", lambda: 2 * SIZE - 1)
            assert read_into_large_pages(opened, SIZE) is None, "too little memory"
        monkeypatch.setattr(large_pages, "_ENABLED", tmp_path / "enabled")
        assert read_into_large_pages(opened, SIZE) is None, "no such pages"
        (tmp_path / "enabled").write_text("always madvise [never]\n")
        assert read_into_large_pages(opened, SIZE) is None, "turned off"

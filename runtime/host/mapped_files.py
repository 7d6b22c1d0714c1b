"""Files that an engine reads where they lie: an engine that is changed under its host is noticed.

A mapped file is read when it is needed, so bytes that are written into it become weights at once,
and what is cut off it ends the process (SIGBUS). A file that is replaced or removed stays as it was
for who has it mapped. Knows no engine. Source: proc_pid_maps(5).
"""

from __future__ import annotations

import os
from pathlib import Path

from enginehouse.runtime.errors import EngineError

_MAPS = Path("/proc/self/maps")
_LOOK_S = 1.0


class MappedFiles:
    """What this process has mapped of the files in `folder`, once its engine is loaded."""

    def __init__(self, folder: Path, now_s: float) -> None:
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        self._next_s = now_s + _LOOK_S
        for path in mapped_below(folder.resolve()):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # removed since: nobody can write into it by its name
            self._files[path] = (file, _state(file))

    def check(self, now_s: float) -> None:
        """Once a second. Raises EngineError for a file that was written into."""
        if now_s < self._next_s:
            return
        self._next_s = now_s + _LOOK_S
        for path, (file, state) in self._files.items():
            if _state(file) != state:
                raise EngineError(
                    f"{path} was changed while it is served; what it holds now is not trusted: put "
                    "a new engine in a new folder, and send SIGHUP"
                )

    def close(self) -> None:
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()


def mapped_below(folder: Path) -> list[Path]:
    """Files below `folder`, as the kernel names them; none where it does not tell."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    # address perms offset device inode path
    paths = {Path(words[5]) for line in lines if len(words := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if folder in path.parents)


def _state(file: int) -> tuple[int, int]:
    """Size, and when it was last written, in nanoseconds."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns

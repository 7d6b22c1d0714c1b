"""What an interrupted conversion has finished, so that the next one goes on from there.

A folder beside the unfinished checkpoint. It belongs to one plan and one source: its key says
which. A unit counts as finished only while every byte of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from enginehouse.build.convert.rank_file import Stored
from enginehouse.build.convert.rank_files import Sink
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.choices import choices
from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.layer_errors import ErrorLog
from enginehouse.build.source import SourceCheckpoint


def conversion_key(plan: BuildPlan, source: SourceCheckpoint) -> str:
    """One string for everything that shapes the conversion: choices, and the source's files by
    name, size and time.
    """
    stats = {path.name: path.stat() for path in source.files}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}
    settled = [choices(plan), plan.config.to_dict(), asdict(plan.config.mapping)]
    parts = [version("enginehouse"), settled, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


UNITS, ERRORS = "units.jsonl", "errors.jsonl"


class Journal:
    """Units that were written, in the order they were. Threads may record at once.

    errors: how far the layers have moved.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / UNITS
        self._lock = threading.Lock()
        self.errors = ErrorLog(directory / ERRORS)

    def begin(self, key: str) -> None:
        """Start anew in a folder that has no journal."""
        self._directory.mkdir()
        (self._directory / "key").write_text(key)

    def belongs_to(self, key: str) -> bool:
        try:
            return (self._directory / "key").read_text() == key
        except OSError:
            return False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was finished that is worth keeping."""
        beside = {"key", ERRORS}
        return all(path.name in beside for path in self._directory.iterdir())

    def record(self, unit: str, stored: Sequence[Stored]) -> None:
        """A unit's tensors are in their files."""
        line = json.dumps([unit, stored]) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def entries(self) -> dict[str, list[Stored]]:
        """What was recorded."""
        return self.read_units(self._path)

    def copy_to(self, folder: Path) -> None:
        """What was recorded, and how far the layers have moved, into another folder."""
        for name in (UNITS, ERRORS):
            if (self._directory / name).exists():
                shutil.copyfile(self._directory / name, folder / name)

    @staticmethod
    def read_units(path: Path) -> dict[str, list[Stored]]:
        """Of a journal's file; a last line that was cut off counts for nothing."""
        found: dict[str, list[Stored]] = {}
        with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    unit, stored = json.loads(line)
                    found[unit] = [Stored(*item) for item in stored]
        return found

    def finished(self, sink: Sink, advance: Callable[[int], None]) -> set[str]:
        """The units whose every tensor is still on the disk as it was written, by its digest."""

        def check(item: tuple[str, list[Stored]]) -> bool:
            intact = all([sink.holds(stored) for stored in item[1]])
            advance(sum(stored.num_bytes for stored in item[1]))
            return intact

        entries = self.entries()
        with ThreadPoolExecutor(2) as pool:
            intact = list(pool.map(check, entries.items()))
        return {unit for unit, whole in zip(entries, intact, strict=True) if whole}

    def activations(self, name: str) -> SavedActivations:
        """Where a walk over the layers keeps how far it has come."""
        return SavedActivations(self._directory / f"{name}.safetensors")

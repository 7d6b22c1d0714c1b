"""What a build says while it works: a line for each stage, a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Stage:
    """One stage at work. `finish` gives the sentence its line ends with."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total) if progress else None
        self.summary = ""

    def advance(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def finish(self, summary: str) -> None:
        self.summary = summary


class BuildProgress:
    """Writes to standard error, so that standard output stays for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Show a stage while the body runs; its line stays with the time it took.

        unit: "bytes" shows amounts and speed, anything else counts.
        """
        started_s = time.monotonic()
        bar = None
        if total and self.console.is_terminal and not self.console.quiet:
            columns: list[ProgressColumn] = [TextColumn(f"{name:<10}"), BarColumn()]
            columns += (
                [DownloadColumn(binary_units=True), TransferSpeedColumn()]
                if unit == "bytes"
                else [MofNCompleteColumn(), TextColumn(unit)]
            )
            bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        if bar is None:
            stage = Stage(None, total)
            yield stage
        else:
            with bar:
                stage = Stage(bar, total)
                yield stage
        seconds = time.monotonic() - started_s
        self.console.print(f"[bold]{name:<10}[/bold] {seconds:6.1f} s  ", end="")
        self.console.print(stage.summary, markup=False)

    def note(self, text: str) -> None:
        """A line of its own, under the stage before it."""
        self.console.print(" " * 21 + text, markup=False)


def mib(count: int) -> str:
    """Bytes for people: `1,234 MiB`."""
    return f"{count / 2**20:,.0f} MiB"

"""What a build says while it works: a line for each stage, a bar on a terminal.

Where there is no terminal, or nothing to measure, a stage that takes long says how far it is every
ten seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
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

_LINE_S = 10.0
_SPEED_S = 3600.0  # steps differ: the mean of all is a better guess than that of the last ones


class Stage:
    """One stage at work. `finish` gives the sentence its line ends with.

    total: of what is counted in `unit`, None when nothing is.
    """

    def __init__(self, total: int | None, unit: str, started_s: float) -> None:
        self.summary = ""
        self._total, self._unit = total, unit
        self._done = self._found = 0
        self._started_s = started_s
        self._bar: Progress | None = None

    def show_in(self, bar: Progress) -> None:
        """Follow the stage in a bar of its own."""
        self._bar, self._task = bar, bar.add_task("", total=self._total)

    def resume(self, count: int) -> None:
        """So much was finished before: it counts as done, and tells nothing of the speed."""
        self._done = self._found = count
        if self._bar is not None:
            self._bar.reset(self._task, completed=count)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def finish(self, summary: str) -> None:
        self.summary = summary

    def state(self, now_s: float) -> str:
        """How far it is, and about how long it takes yet, where that can be told."""
        if not self._total:
            return "still at work"
        amounts = (mib(self._done), mib(self._total))
        if self._unit != "bytes":
            amounts = (f"{self._done:,}", f"{self._total:,} {self._unit}")
        text = f"{amounts[0]} of {amounts[1]}"
        done = self._done - self._found
        if not done:
            return text
        left_s = (now_s - self._started_s) / done * (self._total - self._done)
        return f"{text}, about {left_s:,.0f} s left"


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
        stage = Stage(total, unit, started_s)
        if total and self.console.is_terminal and not self.console.quiet:
            columns: list[ProgressColumn] = [TextColumn(f"{name:<10}"), BarColumn()]
            columns += (
                [DownloadColumn(binary_units=True), TransferSpeedColumn()]
                if unit == "bytes"
                else [MofNCompleteColumn(), TextColumn(unit)]
            )
            with Progress(
                *columns,
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                speed_estimate_period=_SPEED_S,
            ) as bar:
                stage.show_in(bar)
                yield stage
        else:

            def tell() -> None:
                self._line(name, started_s, stage.state(time.monotonic()))

            with ticking(_LINE_S, tell):
                yield stage
        self._line(name, started_s, stage.summary)

    def _line(self, name: str, started_s: float, text: str) -> None:
        seconds = time.monotonic() - started_s
        self.console.print(f"[bold]{name:<10}[/bold] {seconds:6.1f} s  ", end="")
        self.console.print(text, markup=False)

    def note(self, text: str) -> None:
        """A line of its own, under the stage before it."""
        self.console.print(" " * 21 + text, markup=False)


@contextmanager
def ticking(seconds: float, tick: Callable[[], None]) -> Iterator[None]:
    """Call `tick` every so many seconds of the body, in a thread, whatever holds the body up."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def mib(count: int) -> str:
    """Bytes for people: `1,234 MiB`."""
    return f"{count / 2**20:,.0f} MiB"

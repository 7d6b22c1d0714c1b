"""What a stage says of itself: how far it is, how long it takes yet, and that it is still there."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from enginehouse.build import progress
from enginehouse.build.progress import BuildProgress, Stage

DEADLINE_S = 30


def test_the_time_that_is_left_is_that_of_what_was_done_so_far() -> None:
    stage = Stage(30, "layers", started_s=100.0)
    assert stage.state(105.0) == "0 of 30 layers"
    stage.advance(10)
    assert stage.state(140.0) == "10 of 30 layers, about 80 s left"


def test_what_an_earlier_build_had_done_tells_nothing_of_the_speed() -> None:
    stage = Stage(40 << 20, "bytes", started_s=0.0)
    stage.resume(20 << 20)
    assert stage.state(5.0) == "20 MiB of 40 MiB"
    stage.advance(5 << 20)
    assert stage.state(10.0) == "25 MiB of 40 MiB, about 30 s left"


class Written(io.StringIO):
    """Tells when a text has come."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self._wanted = wanted
        self.came = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if self._wanted in self.getvalue():
            self.came.set()
        return count


@pytest.mark.parametrize(
    ("total", "wanted"), [(3, "1 of 3 layers, about "), (None, "still at work")]
)
def test_without_a_terminal_a_long_stage_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, total: int | None, wanted: str
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.01)
    file = Written(wanted)
    build = BuildProgress()
    build.console = Console(file=file, soft_wrap=True)
    with build.stage("convert", total, "layers") as stage:
        stage.advance(1)
        assert file.came.wait(DEADLINE_S), file.getvalue()
        stage.finish("all of it")
    lines = file.getvalue().splitlines()
    assert all(line.startswith("convert ") for line in lines)
    assert lines[-1].endswith("s  all of it")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_short_stage_has_its_one_line() -> None:
    build = BuildProgress()
    build.console = Console(file=io.StringIO(), soft_wrap=True)
    with build.stage("plan") as stage:
        stage.finish("tiny")
    name, _, *rest = build.console.file.getvalue().split()  # type: ignore[attr-defined]
    assert [name, *rest] == ["plan", "s", "tiny"]

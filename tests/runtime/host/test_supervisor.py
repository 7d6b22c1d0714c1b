"""The supervisor and hosts that are shell scripts: what it notices, and when."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.runtime.host.heartbeat import Heartbeat
from enginehouse.runtime.host.supervisor import HostSupervisor

_HOST = """
import os, sys, time
lives = open(sys.argv[1], "a")
print(os.getpid(), file=lives, flush=True)
pipe = int(sys.argv[-1])
os.write(pipe, b'{"name": "scripted"}\\n')
for beat in range(int(sys.argv[2])):
    os.write(pipe, b"\\n")
    time.sleep(0.05)
open(sys.argv[1] + ".beats", "a").write(f"{beat + 1}\\n")
time.sleep(600)
"""


def lives(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The log of a host that beats for a second and then stands still."""
    monkeypatch.setattr("enginehouse.runtime.host.supervisor.BEAT_S", 0.1)
    script, log = tmp_path / "host.py", tmp_path / "lives"
    script.write_text(_HOST)
    ready = threading.Event()
    supervisor = HostSupervisor(
        [sys.executable, str(script), str(log), "20"],
        lambda facts: ready.set() if facts == {"name": "scripted"} else None,
        pytest.fail,
        silence_s=1.0,
    )
    supervisor.start()
    assert ready.wait(30)
    yield log
    supervisor.stop()


def test_a_host_that_stands_still_is_ended_and_another_is_started(supervised: Path) -> None:
    first = lives(supervised)[0]
    began = time.monotonic()
    while len(lives(supervised)) < 2:
        assert time.monotonic() - began < 30, "nobody ended it"
        time.sleep(0.05)
    beats = Path(f"{supervised}.beats").read_text().split()
    assert beats == ["20"], "it was ended while it moved"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_heart_beats_while_nothing_runs_or_what_runs_gets_on() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    heart = Heartbeat(writer, 0.0)
    looks = [  # seconds, whether it runs, progress, whether it beats
        (0.0, False, 0, True),
        (0.5, False, 0, False),  # within the second
        (1.0, False, 0, True),
        (2.0, True, 0, False),  # it runs, and nothing came of it
        (3.0, True, 1, True),
        (4.0, True, 1, False),
        (5.0, False, 1, True),
    ]
    for now_s, running, iterations, beats in looks:
        heart.beat(now_s, running, iterations)
        try:
            found = os.read(reader, 100)
        except BlockingIOError:
            found = b""
        assert found == (b"\n" if beats else b""), now_s
    os.close(reader)
    heart.beat(9.0, False, 1)  # nobody listens: no harm
    heart.beat(19.0, False, 1)
    os.close(writer)

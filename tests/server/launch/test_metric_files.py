"""The room of a worker's metrics: taken when it starts, or said to be missing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from enginehouse.server.launch.metric_files import take_room

# Counts in a folder, and says what is in it: the sum over all processes, and bytes that are there.
_COUNTS = """
import os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.multiprocess import MultiProcessCollector
from enginehouse.server.launch.metric_files import take_room
folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
if sys.argv[1] == "full":
    def no_room(*args):
        raise OSError(28, "No space left on device")
    os.posix_fallocate = no_room
take_room(folder)
own, all_of_them = CollectorRegistry(), CollectorRegistry()
Counter("asked", "Times", registry=own).inc(3)
Histogram("took", "Seconds", registry=own).observe(1)
MultiProcessCollector(all_of_them)
taken = sorted(path.stat().st_blocks * 512 for path in folder.iterdir())
print(all_of_them.get_sample_value("asked_total"), own.get_sample_value("asked_total"), *taken)
"""


def counts(folder: Path, how: str) -> list[str]:
    folder.mkdir()
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", _COUNTS, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


def test_a_worker_s_counts_have_their_room_before_they_are_made(tmp_path: Path) -> None:
    counted, own, *taken = counts(tmp_path / "metrics", "roomy")
    assert (counted, own) == ("3.0", "3.0")
    assert len(taken) == 2 and min(map(int, taken)) >= 128 * 1024, "no page of them is sparse"


def test_on_a_full_disk_a_worker_counts_for_itself_alone(tmp_path: Path) -> None:
    assert counts(tmp_path / "metrics", "full") == ["None", "3.0"]


def test_missing_room_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    monkeypatch.setattr("enginehouse.server.launch.metric_files._count_alone", lambda: None)
    take_room(tmp_path)
    assert f"{tmp_path} has no room for the metrics of this worker (No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []

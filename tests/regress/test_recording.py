"""A recording is read as it was written, the same bytes each time, and never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from enginehouse.regress.recording import (
    HEAD,
    check_place,
    is_recording,
    read_recording,
    write_recording,
)
from enginehouse.runtime.errors import EnginehouseError
from makers.recordings import recording


def test_it_is_read_as_it_was_written_and_written_the_same_again(tmp_path: Path) -> None:
    made = recording()
    write_recording(made, tmp_path / "a")
    write_recording(made, tmp_path / "b")
    assert is_recording(tmp_path / "a") and read_recording(tmp_path / "a") == made
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert one == other and len(one) == 5


def test_it_is_lines_of_json_that_a_review_can_read(tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines][:2] == ["ask", "sums.0"]
    assert json.loads((tmp_path / HEAD).read_text())["manifest"]["digest"] == "sha256:old"
    assert "\n " in (tmp_path / HEAD).read_text()


def test_a_newer_recording_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    write_recording(recording(turns=[]), tmp_path)
    assert read_recording(tmp_path).turns == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EnginehouseError, match="holds something that is no baseline"):
        write_recording(recording(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(EnginehouseError, match="is a file; name a folder"):
        check_place(tmp_path / "thesis.txt")


def test_one_that_was_left_half_written_is_taken_over(tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    (tmp_path / HEAD).unlink()
    with pytest.raises(EnginehouseError, match="cannot be read as a baseline"):
        read_recording(tmp_path)
    write_recording(recording(), tmp_path)
    assert read_recording(tmp_path) == recording()


@pytest.mark.parametrize("name", ["answers.jsonl", "scores.jsonl.gz", "speed.jsonl"])
def test_what_is_damaged_is_one_sentence(name: str, tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] + b"\xff" * 9)
    with pytest.raises(EnginehouseError, match="cannot be read as a baseline"):
        read_recording(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(EnginehouseError, match="cannot be read as a baseline"):
        read_recording(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(EnginehouseError, match="cannot be read as a baseline"):
        read_recording(tmp_path)


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    head = json.loads((tmp_path / HEAD).read_text())
    (tmp_path / HEAD).write_text(json.dumps({**head, "format": 9}))
    with pytest.raises(EnginehouseError, match="has format 9; this version reads 1"):
        read_recording(tmp_path)

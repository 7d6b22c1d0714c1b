"""Four files, each whole; JSON that reads back as what was written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.outcome import Outcome, PerplexityRatio, TextDivergence
from enginehouse.regress.report import files
from enginehouse.runtime.errors import EnginehouseError
from makers.outcomes import empty_outcome, full_outcome, hostile_outcome

NAMES = ["junit.xml", "report.md", "report.html", "report.json"]


@pytest.mark.parametrize("outcome", [empty_outcome(), full_outcome()], ids=["empty", "full"])
def test_the_json_reads_back_as_the_outcome(outcome: Outcome, tmp_path: Path) -> None:
    paths = files.write_reports(outcome, tmp_path / "made" / "here")
    assert [path.name for path in paths] == NAMES
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(NAMES)
    content = paths[3].read_bytes()
    assert msgspec.json.decode(content, type=Outcome) == outcome
    assert content == files.report_json(outcome)
    assert list(json.loads(content)) == list(Outcome.__struct_fields__)


def test_hostile_text_is_stored_but_for_what_utf_8_cannot_write() -> None:
    outcome = hostile_outcome()
    stored = msgspec.json.decode(files.report_json(outcome), type=Outcome)
    for sentence, kept in zip(outcome.explained, stored.explained, strict=True):
        assert kept == "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in sentence)
    assert stored.findings[0].figures["nan"] == "nan"
    assert stored.findings[0].figures["inf"] == "-inf"


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"divergence": [TextDivergence("a", [0.0, math.nan])]}, r"divergence\[0\].kl\[1\] is nan"),
        ({"perplexity": [PerplexityRatio("a", 1, 1, math.inf)]}, r"perplexity\[0\].high is inf"),
    ],
)
def test_a_curve_that_json_cannot_hold_is_refused_by_its_place(
    changed: dict[str, object], place: str, tmp_path: Path
) -> None:
    outcome = msgspec.structs.replace(full_outcome(), **changed)
    with pytest.raises(EnginehouseError, match=f"outcome.{place}"):
        files.write_reports(outcome, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES[:3])


def test_a_file_that_cannot_be_made_whole_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_reports(full_outcome(), tmp_path)
    former = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        files.write_reports(empty_outcome(), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == former


def test_a_check_of_an_unknown_group_is_in_every_report(tmp_path: Path) -> None:
    """A new check or group needs nothing in the reports."""
    finding = Finding("colour", "how blue", Status.CANNOT_TELL, "It is 3 blue; 4 was wanted.")
    outcome = msgspec.structs.replace(full_outcome(), findings=[finding])
    for path in files.write_reports(outcome, tmp_path):
        assert "It is 3 blue; 4 was wanted." in path.read_text(encoding="utf-8"), path.name

"""Baselines, suites, limits, settings and keys of which somebody changed a few bytes: each is read,
or refused in one sentence, within little memory.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given

from enginehouse.build.plan.settings import load_settings
from enginehouse.regress import recording as recording_file
from enginehouse.regress.limits import load_limits
from enginehouse.regress.recording import HEAD, read_recording, write_recording
from enginehouse.regress.suite.reading import load_suite
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.api_keys import read_keys
from makers.fuzzing import damaged, files_like, little_memory, tries
from makers.paths import ROOT
from makers.recordings import recording

SUITE = b"""name: mine
texts: [{name: a, text: "one two", repeat: 2}, {name: b, ledger: 3}]
prompts:
  - {name: p, prompt: "hello", max_tokens: 4}
  - {name: q, ledger: 2, messages: [{role: user, content: "x"}], tools: [{type: function}]}
tasks: [{kind: sums, shown: 1, ask: [["1+1", "2"], ["2+2", "4"]]}]
"""
LIMITS = resources.files("enginehouse.regress").joinpath("limits.yaml").read_bytes()
SETTINGS = (ROOT / "configs" / "nemotron-70b-int4.yaml").read_bytes()
KEYS = b"alice sk-1 rpm=60 tpm=1000\n# none\nbob sha256:" + b"a" * 64 + b" concurrent=2\n"
READERS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "suite": (SUITE, load_suite),
    "limits": (LIMITS, load_limits),
    "settings": (SETTINGS, lambda path: load_settings({}, path)),
    "keys": (KEYS, lambda path: read_keys({"ENGINEHOUSE_API_KEYS_FILE": str(path)})),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_text_file_is_read_or_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    good, read = READERS[kind]
    path = tmp_path / kind
    path.write_bytes(good)
    read(path)

    @tries(60)
    @given(damaged(good))
    def read_one(data: bytes) -> None:
        path.write_bytes(data)
        refused_or_read(read, path)

    read_one()


@pytest.mark.parametrize(
    "name", [HEAD, "answers.jsonl", "behaviour.jsonl", "speed.jsonl", "scores.jsonl.gz"]
)
def test_a_baseline_is_read_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    write_recording(recording(), tmp_path)
    good = (tmp_path / name).read_bytes()

    @tries(60)
    @given(files_like(good))
    def read_one(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        refused_or_read(read_recording, tmp_path)

    read_one()


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_file, "_MOST_BYTES", 100_000)
    write_recording(recording(), tmp_path)
    assert read_recording(tmp_path) == recording()
    (tmp_path / "scores.jsonl.gz").write_bytes(gzip.compress(bytes(100_001)))
    with pytest.raises(EnginehouseError, match="holds more than 100000 bytes"):
        read_recording(tmp_path)


@pytest.mark.parametrize("kind", ["suite", "limits", "settings"])
def test_a_text_file_that_is_nested_too_deep_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    path.write_text("a: " + "[" * 1500, encoding="utf-8")
    with pytest.raises(EnginehouseError):
        READERS[kind][1](path)


@pytest.mark.parametrize("fields", ["repeat: 10000000000", "ledger: 10000000", "repeat: 3000000"])
def test_a_suite_makes_no_text_without_end(fields: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    text = "" if "ledger" in fields else 'text: "sixteen letters.", '
    path.write_text(f"texts: [{{name: a, {text}{fields}}}]", encoding="utf-8")
    with little_memory(), pytest.raises(EnginehouseError, match="is no suite"):
        load_suite(path)


def refused_or_read(read: Callable[[Path], object], path: Path) -> None:
    try:
        with little_memory():
            read(path)
    except EnginehouseError as error:
        assert str(error).splitlines() == [str(error)]
        assert 0 < len(str(error).encode()) <= 8000

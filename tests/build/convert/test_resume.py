"""A conversion that was interrupted goes on where it was, and ends as if it never had been."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.build import cli
from enginehouse.build.convert import conversion
from enginehouse.build.convert.conversion import _MemoryGate
from enginehouse.build.convert.journal import Journal
from enginehouse.build.convert.rank_file import Stored
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize import units
from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.layerwise_awq import LayerwiseAwq
from enginehouse.build.quantize.layerwise_fp8 import LayerwiseFp8
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.sources.safetensors_file import read_safetensors_header
from enginehouse.runtime.engine import MANIFEST
from makers.engines import build_engine, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICES: dict[str, dict[str, Any]] = {
    "none": {"quant": "none", "tp": 2, "pp": 2},
    "int4": {"quant": "int4", "tp": 2},
    "fp8": {"quant": "fp8", "kv_cache_dtype": "fp8"},
    "int4_awq": {"quant": "int4_awq", "tp": 2, "pp": 2},
    "hf": {"quant": "int4_awq", "format": "hf"},
}
SMALL = {"calib_samples": 2, "calib_length": 32, "until": "convert"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    path = tmp_path_factory.mktemp("m") / "model"
    return open_checkpoint(write_tiny_checkpoint(path, layers=4, hidden=128, intermediate=256))


@pytest.fixture(autouse=True)
def every_layer_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SavedActivations, "interval_s", 0.0)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the units that are converted from now on."""
    keys: list[str] = []
    real = units.convert_unit

    def counted(config: Any, unit: units.Unit, *rest: Any) -> Iterator[Any]:
        keys.append(unit.key)
        return real(config, unit, *rest)

    monkeypatch.setattr(conversion, "convert_unit", counted)
    return keys


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C once `count` units have been recorded."""
    real = Journal.record
    lock = threading.Lock()
    recorded = 0

    def record(self: Journal, unit: str, stored: list[Stored]) -> None:
        nonlocal recorded
        with lock:
            if recorded == count:
                raise KeyboardInterrupt
            recorded += 1
        real(self, unit, stored)

    monkeypatch.setattr(Journal, "record", record)


def contents(path: Path) -> dict[str, bytes]:
    """By name; but for the manifest, which has the time."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != MANIFEST}


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("count", [1, 6, 13])
def test_an_interrupted_conversion_goes_on(
    source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: list[str],
    form: str,
    count: int,
) -> None:
    choices = {**CHOICES[form], **SMALL}
    whole = contents(build_engine(source, tmp_path / "whole", **choices))
    total = len(converted)
    assert total > 13 and len(set(converted)) == total
    converted.clear()
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt, match="give the same command again to go on"):
            build_engine(source, tmp_path / "e", **choices)
    assert not (tmp_path / "e").exists() and (tmp_path / ".e.partial").exists()
    converted.clear()
    assert contents(build_engine(source, tmp_path / "e", **choices)) == whole
    again = len(converted) - (total - count)
    assert again == 0 or (form in ("fp8", "int4_awq", "hf") and again == 1), (
        "the layer that the walk was saved in front of"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "whole"]


@pytest.mark.parametrize("form", ["none", "fp8", "int4_awq"])
def test_a_finished_part_that_was_damaged_is_made_again(
    source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: list[str],
    form: str,
) -> None:
    """The damage is in the first layer: a walk must then meet all of them again."""
    choices = {**CHOICES[form], **SMALL}
    whole = contents(build_engine(source, tmp_path / "whole", **choices))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            build_engine(source, tmp_path / "e", **choices)
    entries = Journal(tmp_path / ".e.partial" / "journal").entries()
    wanted = "layers.0.attention.qkv" if form != "none" else "layers.0."
    key = next(key for key in entries if wanted in key)
    file = tmp_path / ".e.partial" / "engine" / "rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[read_safetensors_header(file)[entries[key][0].name].offset] ^= 1
    file.write_bytes(data)
    converted.clear()
    assert contents(build_engine(source, tmp_path / "e", **choices)) == whole
    assert key in converted


def test_another_choice_starts_anew(
    source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: list[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            build_engine(source, tmp_path / "e", quant="none", **SMALL)
    converted.clear()
    build_engine(source, tmp_path / "e", quant="fp8_rowwise", **SMALL)
    plan = make_plan(load_settings({"quant": "fp8_rowwise"}), source)
    assert len(converted) == len(list(units.units(plan.config, source)))
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_interrupted_calibration_goes_on_at_its_layer(
    source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {**CHOICES["fp8"], **SMALL}
    whole = contents(build_engine(source, tmp_path / "whole", **choices))
    asked: list[str] = []
    real = ReferenceModel._stored

    def stored(self: ReferenceModel, prefix: str) -> dict[str, torch.Tensor]:
        if prefix.startswith(("transformer.layers.", "transformer.vocab_embedding.")):
            asked.append(prefix)
        if prefix == "transformer.layers.2." and len(asked) < 5:
            raise KeyboardInterrupt
        return real(self, prefix)

    monkeypatch.setattr(ReferenceModel, "_stored", stored)
    with pytest.raises(KeyboardInterrupt, match="go on"):
        build_engine(source, tmp_path / "e", **choices)
    assert asked[1:] == [f"transformer.layers.{i}." for i in range(3)]
    assert contents(build_engine(source, tmp_path / "e", **choices)) == whole
    layers = [f"transformer.layers.{i}." for i in (2, 3, 0, 1, 2, 3)]
    layers.insert(2, asked[0])  # the walk that quantises starts anew: it had not begun
    assert asked[4:] == layers


@pytest.mark.parametrize(("form", "walk"), [("int4_awq", LayerwiseAwq), ("fp8", LayerwiseFp8)])
def test_no_layer_is_quantised_twice(
    source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    walk: type[Any],
) -> None:
    searched: list[int] = []
    real = walk.__call__

    def call(self: Any, layer: int) -> dict[str, torch.Tensor]:
        searched.append(layer)
        if searched == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(self, layer)

    monkeypatch.setattr(walk, "__call__", call)
    for _ in range(2):
        try:
            build_engine(source, tmp_path / "e", **CHOICES[form], **SMALL)
        except KeyboardInterrupt:
            continue
    # Layer 1 was saved as it was entered: it alone is done again.
    assert searched in ([0, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_goes_on(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Killed as a verified engine is about to be compiled: all of the conversion stands."""
    script = (
        "import os, sys\n"
        "from enginehouse.build import cli\nfrom enginehouse.build.backends import torch\n"
        f"torch.engine_manifest = lambda *args: os.kill(os.getpid(), {int(number)})\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--max-batch-size", "4"]
    run = subprocess.run(
        [sys.executable, "-c", script, *flags, "--quiet"], capture_output=True, text=True
    )
    if number == signal.SIGTERM:
        assert run.returncode == 130
        assert "interrupted" in run.stderr and ".e.partial keeps what is finished" in run.stderr
    else:
        assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "e").exists()
    assert cli.main(flags) == 0
    assert "finished parts are intact" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_build_that_is_refused_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    (path / "tokenizer.json").write_text("{}")
    assert cli.main([str(path), "-o", str(tmp_path / "e"), "--quant", "fp8", "--quiet"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=4, max_size=40))
def test_the_memory_gate_keeps_its_budget(sizes: list[int]) -> None:
    """Three threads: never above 100 together, except for one that is larger, alone."""
    gate, lock = _MemoryGate(100), threading.Lock()
    held: list[int] = []
    seen: list[list[int]] = []

    def work(mine: list[int]) -> None:
        for size in mine:
            with gate.holding(size):
                with lock:
                    held.append(size)
                    seen.append(list(held))
                with lock:
                    held.remove(size)

    threads = [threading.Thread(target=work, args=(sizes[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == len(sizes)
    assert all(sum(together) <= 100 or len(together) == 1 for together in seen)

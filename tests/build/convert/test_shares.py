"""A conversion in shares ends in the bytes of one that was never shared, or in one sentence."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from enginehouse.build import cli
from enginehouse.build.convert.conversion import convert_units
from enginehouse.build.convert.journal import UNITS, Journal
from enginehouse.build.convert.share_costs import share_costs
from enginehouse.build.convert.shares import Share, share_of
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.progress import BuildProgress
from enginehouse.build.quantize.units import units
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.stages import build
from enginehouse.runtime.engine import MANIFEST, read_manifest
from enginehouse.runtime.errors import PlanError
from makers.engines import build_engine, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICES: dict[str, dict[str, Any]] = {
    "none": {"quant": "none", "tp": 2, "pp": 2},
    "int4": {"quant": "int4", "tp": 2},
    "rowwise": {"quant": "fp8_rowwise"},
    "kv": {"quant": "int4", "kv_cache_dtype": "int8", "calib_samples": 2, "calib_length": 32},
    "hf": {"quant": "mxfp8", "format": "hf"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    path = tmp_path_factory.mktemp("m") / "model"
    return open_checkpoint(write_tiny_checkpoint(path, layers=3, hidden=128, intermediate=256))


def make(
    source: SourceCheckpoint, output: Path, share: Share | None = None, **choices: Any
) -> Path:
    values = {"backend": "torch", "until": "compile", **choices, "output": str(output)}
    quiet = BuildProgress(quiet=True)
    result = build(load_settings(values), source, quiet, share, joins=share is None)
    assert result.path is not None
    return result.path


def make_shares(source: SourceCheckpoint, output: Path, count: int, **choices: Any) -> list[Path]:
    numbers = range(1, count + 1)
    return [make(source, output, Share(number, count), **choices) for number in numbers]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != MANIFEST}


@pytest.mark.parametrize("form", CHOICES)
def test_joined_shares_are_byte_for_byte_what_one_machine_makes(
    source: SourceCheckpoint, tmp_path: Path, form: str
) -> None:
    choices = CHOICES[form]
    whole = build_engine(source, tmp_path / "whole", until="compile", **choices)
    shares = make_shares(source, tmp_path / "e", 4, **choices)
    assert [path.name for path in shares] == [f"e.shard-{i}-of-4" for i in range(1, 5)]
    assert not (tmp_path / "e").exists()
    joined = make(source, tmp_path / "e", **choices)
    assert contents(joined) == contents(whole)
    mine, theirs = read_manifest(joined), read_manifest(whole)
    assert mine.digest == theirs.digest
    assert mine.build is not None and theirs.build is not None
    assert mine.build.errors == theirs.build.errors
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


def test_joining_converts_nothing(
    source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shares(source, tmp_path / "e", 2, quant="int4")
    left: list[int] = []

    def counted(*words: Any) -> None:
        left.append(len(words[-1]))
        convert_units(*words)

    monkeypatch.setattr("enginehouse.build.convert.conversion.convert_units", counted)
    make(source, tmp_path / "e", quant="int4")
    assert left == [0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_each_unit_is_in_one_share_and_shares_are_alike_in_bytes(
    source: SourceCheckpoint, count: int
) -> None:
    plan = make_plan(load_settings({"quant": "int4", "pp": 2, "tp": 2}), source)
    every = [unit.key for unit in units(plan.config, source)]
    shares = [share_of(plan, source, Share(index, count)) for index in range(1, count + 1)]
    assert sum(map(len, shares)) == len(every) and set().union(*shares) == set(every)


def test_a_share_that_is_damaged_is_named_and_left_as_it_is(
    source: SourceCheckpoint, tmp_path: Path
) -> None:
    first, second = make_shares(source, tmp_path / "e", 2, quant="int4")
    path = second / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    at = next(i for i in range(len(data) - 1, 0, -1) if data[i])  # in a tensor of its own
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanError, match=r"e\.shard-2-of-2: .* is not as it was written; bring the"):
        make(source, tmp_path / "e", quant="int4")
    assert path.read_bytes() == bytes(data) and not (tmp_path / "e").exists()
    path.write_bytes(data[:-100])  # cut short
    with pytest.raises(PlanError, match=r"e\.shard-2-of-2: .* is not as it was written"):
        make(source, tmp_path / "e", quant="int4")
    assert first.exists()


def test_what_does_not_belong_together_is_refused(source: SourceCheckpoint, tmp_path: Path) -> None:
    output = tmp_path / "e"
    with pytest.raises(PlanError, match=r"there are no shares e\.shard-I-of-N beside"):
        make(source, output, quant="int4")
    first, second, third = make_shares(source, output, 3, quant="int4")
    with pytest.raises(PlanError, match=r"e\.shard-1-of-3 is a share of another build"):
        make(source, output, quant="none")
    aside = shutil.move(second, tmp_path / "aside")
    with pytest.raises(PlanError, match="of 3 shares of .* 1 are missing: 2/3; bring them here"):
        make(source, output, quant="int4")
    other = write_tiny_checkpoint(
        tmp_path / "other", layers=3, hidden=128, intermediate=256, seed=5
    )
    theirs = make(open_checkpoint(other), output, Share(2, 3), quant="int4")
    with pytest.raises(PlanError, match=r"e\.shard-2-of-3 is a share of another build"):
        make(source, output, quant="int4")
    shutil.rmtree(theirs)
    shutil.move(aside, second)
    (third / "share.json").write_text("{")
    with pytest.raises(PlanError, match=r"share\.json cannot be read"):
        make(source, output, quant="int4")
    make(source, output, Share(1, 2), quant="int4")
    with pytest.raises(PlanError, match="are shares of 2 and of 3; move those of other cuts away"):
        make(source, output, quant="int4")


def test_machines_may_settle_how_they_run_it_each_as_it_can(
    source: SourceCheckpoint, tmp_path: Path
) -> None:
    for number, backend in ((1, "torch"), (2, "cpu")):
        make(source, tmp_path / "e", Share(number, 2), quant="int4", backend=backend)
    assert make(source, tmp_path / "e", quant="int4", max_batch_size=2).exists()


@pytest.mark.parametrize("quant", ["fp8", "int4_awq"])
def test_a_form_whose_layers_wait_for_each_other_is_not_shared(
    source: SourceCheckpoint, tmp_path: Path, quant: str
) -> None:
    with pytest.raises(PlanError, match=f"quant={quant} rounds each layer on what the layers befo"):
        make(source, tmp_path / "e", Share(1, 2), quant=quant)


def test_a_folder_that_is_no_share_is_not_replaced(
    source: SourceCheckpoint, tmp_path: Path
) -> None:
    place = tmp_path / "e.shard-1-of-2"
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(PlanError, match="is there and is no share; move it away"):
        make(source, tmp_path / "e", Share(1, 2), quant="int4")
    assert (place / "mine").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard", "0/4"], "--shard 0/4: wanted I/N, a share of N from 1/N to N/N"),
        (["--shard", "5/4"], "--shard 5/4: wanted I/N"),
        (["--shard", "x"], "--shard x: wanted I/N"),
        (["--shard", "1/4", "--join"], "--shard makes a share and nothing else"),
        (["--shard", "1/4", "--plan"], "--shard makes a share and nothing else"),
        (["--join", "--plan"], "--join has nothing to join for --plan"),
    ],
)
def test_the_command_line_refuses_in_words(
    source: SourceCheckpoint, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(source.path), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_line_makes_shares_and_joins_them(
    source: SourceCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(source.path), "-o", str(tmp_path / "e"), "--quant", "int4", "--backend", "torch"]
    for number in (1, 2):
        assert cli.main([*words, "--shard", f"{number}/2", "--quiet"]) == 0
    assert "e.shard-2-of-2  (share 2 of 2)" in capsys.readouterr().out
    assert cli.main([*words, "--join", "--quiet", "--until", "compile"]) == 0
    assert "(built, sha256:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none", "int4", "rowwise"])
def test_what_a_plan_says_of_shares_is_what_they_read_and_write(
    name: str, source: SourceCheckpoint, tmp_path: Path
) -> None:
    choices = {"backend": "torch", **CHOICES[name]}
    plan = make_plan(load_settings({**choices, "until": "plan"}), source)
    costs = share_costs(plan, source, 2)
    folders = make_shares(source, tmp_path / "e", 2, **CHOICES[name])
    for cost, folder in zip(costs, folders, strict=True):
        stored = [item for each in Journal.read_units(folder / UNITS).values() for item in each]
        assert cost.written_bytes == sum(item.num_bytes for item in stored)
    assert sum(cost.written_bytes for cost in costs) == sum(plan.rank_bytes)
    tensors = source.tensors.infos.values()
    sizes = [math.prod(info.shape) * info.dtype.itemsize for info in tensors]
    assert sum(cost.read_bytes for cost in costs) == sum(sizes)
    assert all(cost.seconds > 0 for cost in costs)


def test_a_config_alone_tells_what_shares_take(
    source: SourceCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many bytes as the weights would have, which are not there."""
    shutil.copy(source.path / "config.json", tmp_path)
    words = [str(tmp_path), "--quant", "int4", "--backend", "torch"]
    assert cli.main([*words, "--plan", "--shares", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1/2", "2/2", "--join")] == [
        *("1/2", "2/2", "--join")
    ]
    bare = open_checkpoint(tmp_path)
    plan = make_plan(load_settings({"quant": "int4", "backend": "torch", "until": "plan"}), bare)
    whole = make_plan(load_settings({"quant": "int4", "backend": "torch"}), source)
    assert share_costs(plan, bare, 3) == share_costs(whole, source, 3)
    for wrong in (["--shares", "2"], ["--plan", "--shares", "0"]):
        assert cli.main([*words, *wrong]) == 2
        assert "wanted 1 to 9999, with --plan" in capsys.readouterr().err
    assert cli.main([str(tmp_path), "--quant", "fp8", "--plan", "--shares", "2"]) == 2

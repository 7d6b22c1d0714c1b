"""Scales of an FP8 KV cache that a quantised source has: carried into the engine, not measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from enginehouse.build import cli
from enginehouse.build.convert import stage
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import CheckpointError
from makers.engines import build_engine
from makers.quantized_writers import Written, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, INTEGER = {"type": "float", "num_bits": 8}, {"type": "int", "num_bits": 8}
MODELOPT = ("k_proj.k_scale", "v_proj.v_scale")
COMPRESSED = ("k_scale", "v_scale")
CARRIED = {0: 0.75, 1: 1.75}  # the larger of keys and values
KV_SCALE = "transformer.layers.0.attention.kv_cache_scaling_factor"


def adding(names: tuple[str, str], layers: tuple[int, ...] = (0, 1)) -> Callable[[Written], None]:
    def add(tensors: Written) -> None:
        for layer in layers:
            for i, name in enumerate(names):
                key = f"model.layers.{layer}.self_attn.{name}"
                tensors[key] = torch.tensor(0.25 + layer + 0.5 * i)

    return add


def source_with_scales(
    path: Path, kind: str = "modelopt fp8", names: tuple[str, str] = MODELOPT
) -> SourceCheckpoint:
    return resolve_source(str(write_quantized(kind, path, adding(names)).quantized), path)


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the text was run")

    monkeypatch.setattr(stage, "kv_maxima", fail)
    monkeypatch.setattr(stage, "calibration_sequences", fail)


def engine_scales(engine: Path, ranks: int) -> list[float]:
    return [float(load_file(engine / f"rank{r}.safetensors")[KV_SCALE]) for r in range(ranks)]


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("asked", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("modelopt fp8", MODELOPT),
        ("compressed-tensors fp8 static", COMPRESSED),
        ("compressed-tensors fp8 dynamic", COMPRESSED),
    ],
)
def test_an_fp8_source_keeps_its_own_kv_scales(
    kind: str, names: tuple[str, str], asked: str, tmp_path: Path
) -> None:
    source = source_with_scales(tmp_path, kind, names)
    engine = build_engine(source, tmp_path / "e", until="convert", pp=2, kv_cache_dtype=asked)
    config = read_config(engine)
    assert config.quantization.kv_cache_quant_algo == "FP8"
    assert source.quantized is not None and source.quantized.kv_scales(config) == CARRIED
    assert engine_scales(engine, 2) == list(CARRIED.values())


@pytest.mark.usefixtures("no_calibration")
def test_carried_scales_survive_a_folder_that_is_cut_again(tmp_path: Path) -> None:
    source = source_with_scales(tmp_path)
    folder = build_engine(source, tmp_path / "one", until="convert")
    again = resolve_source(str(folder), tmp_path)
    engine = build_engine(again, tmp_path / "two", until="convert", tp=2, pp=2)
    assert engine_scales(engine, 4) == [0.75, 0.75, 1.75, 1.75]


@pytest.mark.usefixtures("no_calibration")
def test_carried_scales_are_those_of_the_hugging_face_export(tmp_path: Path) -> None:
    source = source_with_scales(tmp_path)
    export = build_engine(source, tmp_path / "hf", format="hf")
    stored = load_file(export / "model.safetensors")
    for layer, scale in CARRIED.items():
        for name in MODELOPT:
            assert float(stored[f"model.layers.{layer}.self_attn.{name}"]) == scale


def test_an_engine_with_carried_scales_runs_and_verifies(tmp_path: Path) -> None:
    def small(tensors: Written) -> None:
        for layer in (0, 1):
            for name in MODELOPT:
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.02)

    pair = write_quantized("modelopt fp8", tmp_path, small)
    flags = [str(pair.quantized), "-o", str(tmp_path / "e"), "--quiet"]
    assert cli.main([*flags, "--max-batch-size", "4", "--max-num-tokens", "64"]) == 0
    manifest = read_engine(tmp_path / "e").manifest
    assert manifest.choices["kv_cache_dtype"] == "fp8"
    assert manifest.verify is not None and manifest.verify["mean_kl"] < 0.05


def test_an_int8_kv_cache_is_measured_whatever_the_source_has(tmp_path: Path) -> None:
    source = source_with_scales(tmp_path)
    engine = build_engine(
        source,
        tmp_path / "e",
        until="convert",
        kv_cache_dtype="int8",
        calib_samples=1,
        calib_length=32,
    )
    assert read_config(engine).quantization.kv_cache_quant_algo == "INT8"
    assert engine_scales(engine, 1) != [0.75]


def test_int4_weights_leave_the_kv_cache_in_16_bit_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_with_scales(tmp_path, "modelopt int4 awq")
    flags = [str(source.path), "-o", str(tmp_path / "e"), "--until", "convert"]
    assert cli.main(flags) == 0
    said = capsys.readouterr()
    assert "FP8 KV cache needs FP8 weights: it stays in 16 bit" in said.out + said.err
    assert read_config(tmp_path / "e").quantization.kv_cache_quant_algo is None


def test_a_source_without_scales_stays_in_16_bit(tmp_path: Path) -> None:
    pair = write_quantized("modelopt fp8", tmp_path)
    source = resolve_source(str(pair.quantized), tmp_path)
    assert make_plan(load_settings({}), source).config.quantization.kv_cache_quant_algo is None


@pytest.mark.parametrize(
    ("kind", "said", "carried"),
    [
        ("modelopt fp8", {"kv_cache_quant_algo": "FP8"}, True),
        ("modelopt fp8", {"kv_cache_quant_algo": "NVFP4"}, False),
        (
            "compressed-tensors fp8 static",
            {"kv_cache_scheme": FLOAT},
            True,
        ),
        (
            "compressed-tensors fp8 static",
            {"kv_cache_scheme": INTEGER},
            False,
        ),
    ],
)
def test_only_scales_of_an_fp8_cache_are_carried(
    kind: str, said: dict[str, Any], carried: bool, tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path, adding(MODELOPT), **said)
    config = make_plan(load_settings({}), resolve_source(str(pair.quantized), tmp_path)).config
    assert config.quantization.kv_cache_quant_algo == ("FP8" if carried else None)


def test_scales_of_some_layers_are_refused(tmp_path: Path) -> None:
    pair = write_quantized("modelopt fp8", tmp_path, adding(MODELOPT, (1,)))
    source = resolve_source(str(pair.quantized), tmp_path)
    with pytest.raises(CheckpointError, match="1 of 2 layers have scales for the KV cache"):
        make_plan(load_settings({}), source)

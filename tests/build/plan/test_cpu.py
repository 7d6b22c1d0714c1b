"""What backend=cpu makes of a plan: an engine that says so, or a refusal that names the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.plan.this_machine import settle_backend
from enginehouse.build.progress import BuildProgress
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.stages import build
from enginehouse.runtime.cpu.packed_file import LAYOUT, PACKED
from enginehouse.runtime.cpu.support import cpu_refusal
from enginehouse.runtime.engine import read_manifest
from enginehouse.runtime.errors import PlanError
from makers.cpp_compiler import needs_compiler
from makers.engines import EngineMaker


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"quant": "none", "compute_dtype": "float32"}, "compute_dtype=float32"),
        ({"quant": "none", "kv_block_size": 8}, "kv_block_size=8, which 16 does not divide,"),
    ],
)
def test_what_the_kernels_do_not_run_is_refused_by_name(
    tiny_source: SourceCheckpoint, choices: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(load_settings({**choices, "backend": "cpu"}), tiny_source)
    assert str(caught.value) == f"{reason} is not yet run by backend=cpu; choose backend=torch"
    make_plan(load_settings({**choices, "backend": "torch"}), tiny_source)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_size": 577}, "head_size=577"),
        ({"extra": {"kv_lora_rank": 512, "qk_nope_head_dim": 577}}, "qk_nope_head_dim=577"),
    ],
)
def test_heads_beyond_the_kernels_are_refused(
    tiny_source: SourceCheckpoint, sizes: dict[str, Any], reason: str
) -> None:
    config = make_plan(load_settings({"quant": "none"}), tiny_source).config
    refusal = cpu_refusal(replace(config, **sizes), 16, "auto")
    assert refusal == f"{reason} is not yet run by backend=cpu; choose backend=torch"
    assert cpu_refusal(replace(config, head_size=576), 16, "auto") is None


def test_the_engine_is_torchs_folder_with_packed_weights_beside_it(
    make_engine: EngineMaker,
) -> None:
    choices = {"quant": "int4", "group_size": 64, "until": "compile"}
    ours, torchs = (read_manifest(make_engine(**choices, backend=b)) for b in ("cpu", "torch"))
    assert (ours.backend, torchs.backend) == ("cpu", "torch")
    assert ours.files.keys() - torchs.files.keys() == {PACKED}
    assert {name: ours.files[name] for name in torchs.files} == torchs.files
    assert ours.choices["cpu_activations"] == "int8" and ours.versions["packing"] == str(LAYOUT)


def test_an_engine_of_another_layout_is_built_again(
    tiny_source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({"backend": "cpu", "output": str(tmp_path / "e"), "until": "compile"})
    build(settings, tiny_source, BuildProgress(quiet=True))
    assert build(settings, tiny_source, BuildProgress(quiet=True)).reused
    monkeypatch.setattr("enginehouse.build.backends.cpu.LAYOUT", LAYOUT + 1)
    assert not build(settings, tiny_source, BuildProgress(quiet=True)).reused


def settled(source: SourceCheckpoint, **choices: Any) -> tuple[str, str | None]:
    settings, remark = settle_backend(load_settings(choices), source)
    return settings.backend, remark


def test_auto_is_the_kernels_where_they_run_the_model(
    tiny_source: SourceCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "true")
    assert settled(tiny_source) == ("cpu", None)
    assert settled(tiny_source, backend="torch") == ("torch", None)
    assert settled(tiny_source, format="hf") == ("torch", None)
    assert settled(tiny_source, compute_dtype="float32") == (
        "torch",
        "backend=torch: compute_dtype=float32 is not yet run by backend=cpu; choose backend=torch",
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    backend, remark = settled(tiny_source)
    assert backend == "torch" and remark is not None and "is no program on PATH" in remark
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    remark = "backend=torch: this machine has a CUDA GPU, which torch computes on"
    assert settled(tiny_source) == ("torch", remark)


@needs_compiler
@pytest.mark.parametrize(("kept", "most"), [("auto", 1.005), ("int8", 1.125)])
def test_a_build_verifies_by_the_kernels(
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: str,
    most: float,
) -> None:
    monkeypatch.setattr("enginehouse.build.verify.watched_logits", None)  # torch's
    choices = {"quant": "int4", "backend": "cpu", "kv_cache_dtype": kept, "calib_samples": 1}
    settings = load_settings({**choices, "output": str(tmp_path / "e")})
    made = build(settings, tiny_source, BuildProgress(quiet=True))
    assert made.manifest is not None and made.manifest.verify is not None
    assert made.manifest.verify["max_mean_kl"] == pytest.approx(most)
    assert 0 < made.manifest.verify["mean_kl"] <= most

"""What backend=cpu makes of a plan: an engine that says so, or a refusal that names the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.stages import output_path
from enginehouse.runtime.engine import read_manifest
from enginehouse.runtime.errors import PlanError
from makers.engines import EngineMaker, SourceMaker


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"quant": "fp8"}, "quant=fp8"),
        ({"quant": "fp8_rowwise"}, "quant=fp8_rowwise"),
        ({"quant": "int8"}, "quant=int8"),
        ({"quant": "w4a8_awq"}, "quant=w4a8_awq"),
        ({"quant": "none", "kv_cache_dtype": "int8"}, "kv_cache_dtype=int8"),
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


def test_a_mixture_of_experts_is_refused_by_its_family(family_source: SourceMaker) -> None:
    with pytest.raises(PlanError, match=r"a mixture of experts \(MixtralForCausalLM\) is not yet"):
        make_plan(load_settings({"quant": "none", "backend": "cpu"}), family_source("mixtral"))


def test_the_engine_is_torchs_folder_with_another_backend_in_its_manifest(
    make_engine: EngineMaker,
) -> None:
    choices = {"quant": "int4", "group_size": 64, "until": "compile"}
    ours, torchs = (read_manifest(make_engine(**choices, backend=b)) for b in ("cpu", "torch"))
    assert (ours.backend, torchs.backend) == ("cpu", "torch")
    assert ours.files == torchs.files


def test_the_two_cpu_backends_have_places_of_their_own(tiny_source: SourceCheckpoint) -> None:
    plans = [make_plan(load_settings({"backend": b}), tiny_source) for b in ("cpu", "torch")]
    places: list[Path] = [output_path(plan) for plan in plans]
    assert places[0].name == places[1].name + "-cpu"

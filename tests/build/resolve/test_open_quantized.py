"""Checkpoints that say they are quantised: what is judged first, and what a plan needs of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import CheckpointError
from makers.engines import write_tiny_checkpoint
from makers.quantized_writers import KINDS, edit_config, write_quantized


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path)


METHODS = ["awq", "gptq", "auto-round", "fp8", "bitsandbytes", "compressed-tensors", "modelopt"]


@pytest.mark.parametrize("method", METHODS)
def test_an_architecture_that_is_not_supported_is_said_before_any_quantisation(
    method: str, tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    edit_config(
        path, architectures=["OPTForCausalLM"], quantization_config={"quant_method": method}
    )
    with pytest.raises(CheckpointError, match=r"^architecture OPTForCausalLM is not supported; "):
        opened(path)


def test_a_model_that_no_engine_runs_is_said_before_its_quantisation(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    edit_config(path, hidden_act="relu", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="^config.json has hidden_act='relu'"):
        opened(path)


def config_alone(path: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "hf_quant_config.json"):
        if (path / name).exists():
            shutil.copy(path / name, to)
    return to


# q, k, v that share a scale are not seen in config.json, and rare
ASSUMED = {kind: "fp8_rowwise" if form.form == "fp8" else form.form for kind, form in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_alone_is_planned_as_its_checkpoint_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_quantized(kind, tmp_path / "whole").quantized
    alone = config_alone(whole, tmp_path / "alone")
    assert cli.main([str(alone), "--plan"]) == 0
    out, err = capsys.readouterr()
    assert ASSUMED[kind] in out and "config.json alone does not tell, and the plan" in err
    settings = load_settings({"until": "plan"})
    found, wanted = (make_plan(settings, opened(path)) for path in (alone, whole))
    assert found.group_size == wanted.group_size
    assert found.rank_bytes[0] == pytest.approx(wanted.rank_bytes[0], rel=0.05)
    if found.settings.quant == wanted.settings.quant:
        assert found.config.quantization == wanted.config.quantization


MLP_WORDS = {"*mlp.fc", "*mlp.gate", "*mlp.proj"}
MLPS = [f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("awq", {"modules_to_not_convert": ["mlp"]}),
        (
            "autofp8",
            {
                "ignored_layers": [
                    f"model.layers.{i}.mlp.{name}_proj"
                    for i in range(2)
                    for name in ("gate", "up", "down")
                ]
            },
        ),
        ("modelopt fp8", {"exclude_modules": ["lm_head", "model.layers.*.mlp.*"]}),
        ("compressed-tensors w4a16", {"ignore": ["lm_head", "re:.*mlp.*"]}),
        ("auto-round", {"extra_config": {".*mlp.*": {"bits": 16, "data_type": "fp"}}}),
        ("gptq v1", {"dynamic": {"-:.*mlp.*": {}}}),
    ],
)
def test_modules_that_a_config_leaves_out_are_planned_in_16_bit(
    kind: str, said: dict[str, object], tmp_path: Path
) -> None:
    whole = write_quantized(
        kind, tmp_path / "whole", quantises=lambda module: "self_attn" in module, **said
    ).quantized
    settings = load_settings({"until": "plan"})
    plans = [
        make_plan(settings, opened(path))
        for path in (config_alone(whole, tmp_path / "alone"), whole)
    ]
    for plan in plans:
        patterns = plan.config.quantization.exclude_modules or ()
        assert {word for word in patterns if "mlp" in word or "attention" in word} == MLP_WORDS


def test_an_fp8_kv_cache_is_planned_where_a_config_alone_says_so(tmp_path: Path) -> None:
    whole = write_quantized("modelopt fp8", tmp_path / "m", kv_cache_quant_algo="FP8").quantized
    plan = make_plan(load_settings({"until": "plan"}), opened(config_alone(whole, tmp_path / "c")))
    assert plan.config.quantization.kv_cache_quant_algo == "FP8"


def test_a_config_alone_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_quantized("awq", tmp_path / "m").quantized
    alone = config_alone(whole, tmp_path / "c")
    assert cli.main([str(alone), "-o", str(tmp_path / "e"), "--quiet"]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err

"""What checkpoints say of their quantisation: each spelling that is read, each reason against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import CheckpointError
from makers.engines import write_tiny_checkpoint
from makers.quantized_writers import Written, ct_config, edit_config, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path)


INT8 = {"num_bits": 8, "type": "int"}
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"bits": 8}, "AutoAWQ checkpoint with bits=8; wanted 4"),
    ("awq", {"version": "gemv_fast"}, "version='gemv_fast'; wanted 'gemm'"),
    ("awq", {"group_size": 32}, "group_size=32; wanted 64 or 128"),
    ("gptq v1", {"bits": 3}, "GPTQ checkpoint with bits=3; wanted 4"),
    ("gptq v1", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    ("gptq v1", {"group_size": -1}, "group_size=-1; wanted 64 or 128"),
    ("gptq v1", {"quant_method": "bitsandbytes"}, "quantised checkpoints are read from AutoAWQ"),
    ("modelopt fp8", {"quant_algo": "NVFP4"}, "quant_algo='NVFP4'; wanted FP8"),
    ("modelopt w4a8 awq", {"group_size": 64}, "group_size=64; wanted 128, for which W4A8"),
    (
        "compressed-tensors int8",
        ct_config({**INT8, "strategy": "group", "group_size": 64}, None, "int-quantized"),
        "strategy='group'; wanted 'tensor' or 'channel' for INT8",
    ),
    (
        "compressed-tensors int8",
        ct_config({**INT8, "strategy": "channel", "symmetric": False}, None, "int-quantized"),
        "symmetric=False; wanted true, as the engine's INT8 has no zero points",
    ),
    ("compressed-tensors w4a16", {"format": "int-quantized"}, "wanted 'group' and 'pack-quantized"),
    ("compressed-tensors w4a16", {"transform_config": {"R1": {}}}, "rotations are no part"),
    ("compressed-tensors w4a16", {"config_groups": {"a": {}, "b": {}}}, "one scheme for all"),
    (
        "gptq v1",
        {"is_marlin_format": True},
        "GPTQ checkpoint with is_marlin_format=True; wanted false: words in the order of the Mar",
    ),
    ("gptq v1", {"format": "marlin"}, "GPTQ checkpoint with format='marlin'"),
    (
        "gptq v1",
        {"dynamic": {"+:.*down.*": {"bits": 8}}},
        r"dynamic\['\+:.*'\]\['bits'\]=8; wanted",
    ),
    ("autofp8", {"weight_block_size": [128, 128]}, r"weight_block_size=\[128, 128\]; wanted none"),
    ("autofp8", {"activation_scheme": "token"}, "activation_scheme='token'; wanted 'static'"),
    ("auto-round", {"bits": 2}, "AutoRound checkpoint with bits=2; wanted 4"),
    ("auto-round", {"group_size": 32}, "AutoRound checkpoint with group_size=32"),
    ("auto-round", {"act_bits": 8}, "act_bits=8; wanted 16"),
    ("auto-round", {"data_type": "mx_fp"}, "data_type='mx_fp'; wanted 'int'"),
    ("auto-round", {"packing_format": "auto_round:fp8_static"}, "format='auto_round:fp8_static'"),
    (
        "auto-round",
        {"packing_format": "auto_round:llm_compressor"},
        "wanted 'auto_round:auto_gptq'",
    ),
    (
        "auto-round",
        {"extra_config": {"model.layers.1.mlp.down_proj": {"bits": 8}}},
        r"extra_config\['model.layers.1.mlp.down_proj'\]\['bits'\]=8; wanted 4, as all others have",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "wanted"), CONFIGS)
def test_a_variant_without_a_form_is_refused_before_its_weights(
    kind: str, changes: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    quantized, _ = write_quantized(kind, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=wanted):
        opened(quantized)


def drop_input_scales(tensors: Written) -> None:
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        del tensors[name]


def add_bounds(tensors: Written) -> None:
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name.replace("weight_scale", "input_scale_ub")] = torch.tensor([1200.0])


def nothing(tensors: Written) -> None:
    pass


def rename(old: str, new: str) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        for name in [name for name in tensors if name.endswith(f".{old}")]:
            tensors[f"{name.removesuffix(old)}{new}"] = tensors.pop(name)

    return edit


def add_kv_scales(tensors: Written) -> None:
    for layer, (key, value) in enumerate([(0.01, 0.02), (0.04, 0.03)]):
        tensors[f"model.layers.{layer}.self_attn.k_proj.output_scale"] = torch.tensor(key)
        tensors[f"model.layers.{layer}.self_attn.v_proj.output_scale"] = torch.tensor(value)


@pytest.mark.parametrize(
    ("kind", "edit", "changes", "form"),
    [
        ("autofp8", rename("input_scale", "act_scale"), {}, "fp8_rowwise"),
        ("transformers fp8", rename("activation_scale", "qscale_act"), {}, "fp8"),
        ("autofp8", drop_input_scales, {"activation_scheme": "dynamic"}, "fp8_rowwise"),
        ("fbgemm fp8", add_bounds, {}, "fp8_rowwise"),
        ("gptq v1", nothing, {"quant_method": "intel/auto-round"}, "int4"),
        ("auto-round", nothing, {"packing_format": "auto_round:gptq:exllamav2"}, "int4"),
        ("auto-round", nothing, {"extra_config": {"lm_head": {"bits": 16}}}, "int4"),
        ("gptq v1", nothing, {"dynamic": {"-:.*lm_head.*": {}}}, "int4"),
    ],
)
def test_other_spellings_mean_the_same(
    kind: str,
    edit: Callable[[Written], None],
    changes: dict[str, Any],
    form: str,
    tmp_path: Path,
) -> None:
    pair = write_quantized(kind, tmp_path, edit, **changes)
    source, wanted = opened(pair.quantized), load_file(pair.plain / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(source.tensors.read(name).float(), tensor, rtol=1e-6, atol=0)
    assert make_plan(load_settings({}), source).settings.quant == form


def test_transformers_dequantises_its_fp8_to_the_same_weights(tmp_path: Path) -> None:
    path, _ = write_quantized("transformers fp8", tmp_path)
    how = FineGrainedFP8Config("static", None, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=how, dtype=torch.float32)
    source = opened(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.tensors.read(name).float(), tensor), name


def test_autofp8s_kv_scales_are_kept(tmp_path: Path) -> None:
    path, _ = write_quantized("autofp8", tmp_path, add_kv_scales, kv_cache_scheme="static")
    source = opened(path)
    plan = make_plan(load_settings({}), source)
    assert plan.config.quantization.kv_cache_quant_algo == "FP8" and source.quantized is not None
    scales = source.quantized.kv_scales(plan.config)
    assert scales == {0: pytest.approx(0.02), 1: pytest.approx(0.04)}


def move_to_config(path: Path) -> None:
    """As ModelOpt 0.31 says it in config.json, which has no quant_method."""
    said = json.loads((path / "hf_quant_config.json").read_text())
    edit_config(path, quantization_config={**said["quantization"], "producer": said["producer"]})


@pytest.mark.parametrize("alone", [True, False])
def test_a_modelopt_config_without_a_method_is_known_by_its_algorithm(
    alone: bool, tmp_path: Path
) -> None:
    quantized, _ = write_quantized("modelopt fp8", tmp_path)
    move_to_config(quantized)
    if alone:
        (quantized / "hf_quant_config.json").unlink()
    assert make_plan(load_settings({}), opened(quantized)).settings.quant == "fp8"


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ({"quant_method": "modelopt", "quant_algo": None}, False),
        ({"quant_algo": None, "kv_cache_quant_algo": "FP8"}, True),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {},
                "kv_cache_scheme": {"type": "float", "num_bits": 8},
            },
            True,
        ),
    ],
)
def test_weights_that_are_said_not_to_be_quantised_are_read_as_such(
    said: dict[str, Any], noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    add_kv_scales(tensors)
    save_file(tensors, path / "model.safetensors")
    edit_config(path, quantization_config=said)
    assert cli.main([str(path), "--plan", "--quant", "int4"]) == 0
    assert ("scales of a quantised KV cache" in capsys.readouterr().err) == noted


def test_a_modelopt_checkpoint_may_say_it_in_config_json_alone(tmp_path: Path) -> None:
    quantized, _ = write_quantized("modelopt int4 awq", tmp_path)
    (quantized / "hf_quant_config.json").unlink()
    config = json.loads((quantized / "config.json").read_text())
    scheme = {"weights": {"num_bits": 4, "group_size": 64}, "targets": ["Linear"]}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "config_groups": {"group_0": scheme},
    }
    (quantized / "config.json").write_text(json.dumps(config))
    plan = make_plan(load_settings({}), opened(quantized))
    assert (plan.settings.quant, plan.group_size) == ("int4_awq", 64)


def test_an_older_gptq_checkpoint_says_it_in_quantize_config(tmp_path: Path) -> None:
    quantized, _ = write_quantized("gptq v1", tmp_path)
    config = json.loads((quantized / "config.json").read_text())
    settings = config.pop("quantization_config")
    settings.pop("quant_method")
    (quantized / "config.json").write_text(json.dumps(config))
    (quantized / "quantize_config.json").write_text(json.dumps(settings))
    source = opened(quantized)
    assert source.quantized is not None
    assert quantized / "quantize_config.json" in source.files
    assert make_plan(load_settings({}), source).settings.quant == "int4"

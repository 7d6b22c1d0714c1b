"""`--format hf` in blocks of small floats, and in compressed-tensors' layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from enginehouse.build.forms.compressed_layout import COMPRESSED_QUANTS
from enginehouse.build.forms.weight_forms import EXPORT_CONFIGS
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import LAYOUTS, load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.verify import text_logits
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import CheckpointError, PlanError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import SourceMaker, build_engine
from makers.hf_checkpoints import Tensors, exported, meant, save
from makers.paths import CONTRACT

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEMES = json.loads((CONTRACT / "hf" / "compressed-tensors-0.20.json").read_text())["schemes"]
Exporter = Callable[..., Path]


@pytest.fixture(scope="module")
def export(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """export("phi3", "nvfp4", layout=...): its folder, made once."""
    made: dict[str, Path] = {}

    def make(family: str, quant: str, **settings: Any) -> Path:
        settings = {"dtype": "bfloat16", "layout": "modelopt", **settings}
        if quant == "mixed":
            settings["effective_bits"] = 7.0
        key = f"{family} {quant} {sorted(settings.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("blocks") / "hf"
            made[key] = exported(family_source(family), folder, quant=quant, **settings)
        return made[key]

    return make


def linears(tensors: Tensors) -> list[str]:
    names = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    return [name for name in tensors if name.endswith(names)]


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Of the norms of a weight's error and of the weight."""
    return float((found - wanted.float()).norm() / wanted.float().norm())


# What rounding to the nearest loses of a normal distribution, and a little more; NVFP4's columns
# make up for each other's errors on the few tokens that tiny models are calibrated with.
LOSSES = {"nvfp4": 0.3, "w4a16_nvfp4": 0.3, "mxfp8": 0.03, "fp8_block": 0.03}


FAMILY_AND_FORM = [(family, quant) for family in ("biased", "phi3") for quant in LOSSES]
FAMILY_AND_FORM += [("mixtral", "fp8_block"), ("qwen3-moe", "mxfp8"), ("qwen3-moe", "fp8_block")]
FAMILY_AND_FORM += [("mixtral", "nvfp4"), ("qwen2-moe", "w4a16_nvfp4"), ("dots1", "nvfp4")]


@pytest.mark.parametrize(("family", "quant"), FAMILY_AND_FORM)
def test_each_linear_means_the_sources_within_its_form(
    family: str, quant: str, export: Exporter, family_source: SourceMaker
) -> None:
    """In the source's own order of rows too: fused, parted and exchanged; experts one by one."""
    stored = load_file(export(family, quant) / "model.safetensors")
    found, source = meant(stored, EXPORT_CONFIGS[quant].quant_algo), family_source(family)
    for name in linears(found):
        wanted = source.tensors.read(name)
        assert found[name].shape == wanted.shape
        assert stored[name].dtype in (torch.uint8, torch.float8_e4m3fn)
        assert largest_error(found[name], wanted) < LOSSES[quant], name
    assert found.keys() == source.tensors.infos.keys()


def test_mxfp8_and_block_fp8_are_rounded_to_the_nearest(
    export: Exporter, family_source: SourceMaker
) -> None:
    source = family_source("phi3")
    for quant, kind in (("mxfp8", "weight_scale"), ("fp8_block", "weight_scale_inv")):
        stored = load_file(export("phi3", quant) / "model.safetensors")
        for name in linears(stored):
            weight = source.tensors.read(name).float()
            scale = stored[f"{name.removesuffix('weight')}{kind}"]
            high, wide = (1, 32) if quant == "mxfp8" else (128, 128)
            for i in range(0, len(weight), high * 5):
                for j in range(0, weight.shape[1], wide):
                    part = weight[i : i + high, j : j + wide]
                    step = part.abs().max() / 448
                    if quant == "mxfp8":
                        exponent = int(np.ceil(np.log2(float(step))))
                        assert scale[i, j // wide] == exponent + 127
                        step = torch.tensor(2.0**exponent)
                    else:
                        assert scale[i // high, j // wide] == step
                    rounded = (part / step).to(torch.float8_e4m3fn).float()
                    found = stored[name][i : i + high, j : j + wide].float()
                    assert torch.equal(found, rounded), (name, i, j)


def test_transformers_reads_block_fp8(export: Exporter, tmp_path: Path) -> None:
    path = export("biased", "fp8_block")
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert not (path / "hf_quant_config.json").exists()
    assert (said["quant_method"], said["weight_block_size"]) == ("fp8", [128, 128])
    keys = ("activation_scheme", "weight_block_size", "modules_to_not_convert")
    config = FineGrainedFP8Config(dequantize=True, **{key: said[key] for key in keys})
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype="bfloat16")
    found = model.state_dict()
    wanted = meant(load_file(path / "model.safetensors"), "FP8_PB_WO")
    assert linears(wanted)
    for name in linears(wanted):
        assert torch.equal(found[name], wanted[name].bfloat16()), name


@pytest.mark.parametrize("quant", ["nvfp4", "w4a16_nvfp4"])
def test_linears_on_one_input_share_the_scales_of_whole_tensors(
    quant: str, export: Exporter
) -> None:
    stored = load_file(export("biased", quant) / "model.safetensors")
    for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
        for kind in ("weight_scale_2", "input_scale"):
            names = [f"model.layers.1.{name}_proj.{kind}" for name in group]
            if kind == "input_scale" and quant == "w4a16_nvfp4":
                assert not any(name in stored for name in names)
                continue
            assert len({float(stored[name]) for name in names}) == 1


def unpack(words: Tensor) -> Tensor:
    """int32 [out, in / 8], the first of eight lowest, each 8 more than it means."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8


LAID_OUT = [("biased", quant) for quant in COMPRESSED_QUANTS if quant not in ("none", "mixed")]
LAID_OUT += [("mixtral", quant) for quant in ("nvfp4", "w4a16_nvfp4", "mxfp8", "fp8_block", "fp8")]


@pytest.mark.parametrize(("family", "quant"), LAID_OUT)
def test_both_layouts_hold_the_same_numbers(family: str, quant: str, export: Exporter) -> None:
    """compressed-tensors' names and shapes, and its own words for the scheme."""
    ours = load_file(export(family, quant) / "model.safetensors")
    path = export(family, quant, layout="compressed_tensors")
    theirs = load_file(path / "model.safetensors")
    scales = {"fp8": (1,), "fp8_rowwise": (-1, 1)}
    seen = set()
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if f"{module}.weight_scale" not in ours and f"{module}.weight_scale_inv" not in ours:
            found, wanted = theirs[name], tensor
        elif quant == "int4" and kind == "weight":
            assert theirs[f"{module}.weight_shape"].tolist() == [2 * len(tensor), tensor.shape[1]]
            low, high = (tensor.view(torch.int8) << 4) >> 4, tensor.view(torch.int8) >> 4
            wanted = torch.stack([low, high], dim=1).flatten(0, 1).int()
            found = unpack(theirs[f"{module}.weight_packed"])
        elif kind in ("weight_scale_2", "input_scale") and "nvfp4" in quant:
            word = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
            found, wanted = theirs[f"{module}.{word[kind]}"], (1 / tensor).view(1)
        elif kind == "pre_quant_scale":
            assert bool((tensor == 1).all()) and name not in theirs
            continue
        elif "scale" in kind:
            found = theirs[f"{module}.{kind.removesuffix('_inv')}"]
            wanted = tensor.view(scales[quant]) if quant in scales else tensor
            assert found.dtype == (torch.bfloat16 if quant == "int4" else tensor.dtype)
            found = found.to(wanted.dtype)
        else:
            packed = "nvfp4" in quant and kind == "weight"
            found, wanted = theirs[f"{module}.{'weight_packed' if packed else kind}"], tensor
        assert torch.equal(found, wanted), name
        seen.add(module)
    assert {name.rpartition(".")[0] for name in theirs} == seen
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert group.pop("format") == said["format"]
    wanted_scheme = {"weights": SCHEMES[quant]["weights"], "targets": ["Linear"]}
    wanted_scheme["input_activations"] = SCHEMES[quant]["input_activations"]
    for args in (wanted_scheme["weights"], wanted_scheme["input_activations"] or {}):
        args.pop("observer", None)  # how it was calibrated
        if args.get("group_size", 0) is None:
            del args["group_size"]
    assert group == wanted_scheme
    routers = {name.removesuffix(".weight") for name in ours if name.endswith("moe.gate.weight")}
    assert {"lm_head", "model.embed_tokens", *routers} == set(said["ignore"])


def test_an_fp8_cache_has_its_scales_and_words_in_both_layouts(export: Exporter) -> None:
    for layout, scheme in (("modelopt", 3), ("compressed_tensors", 5)):
        path = export("biased", "nvfp4", layout=layout, kv_cache_dtype="fp8")
        stored = load_file(path / "model.safetensors")
        said = json.loads((path / "config.json").read_text())["quantization_config"]
        kind = said["kv_cache_scheme"]
        assert (kind["type"], kind["num_bits"], kind["dynamic"]) == ("float", 8, False)
        assert len(kind) == scheme
        middle = {"modelopt": ".k_proj", "compressed_tensors": ""}[layout]
        assert f"model.layers.1.self_attn{middle}.k_scale" in stored


def test_of_two_layouts_the_same_linears_are_in_the_same_forms(export: Exporter) -> None:
    layouts = {layout: export("biased", "mixed", layout=layout) for layout in LAYOUTS}
    ours, theirs = (load_file(path / "model.safetensors") for path in layouts.values())
    config = json.loads((layouts["compressed_tensors"] / "config.json").read_text())
    said = config["quantization_config"]
    assert said["format"] == "mixed-precision"
    formats = {"float-quantized": "weight", "nvfp4-pack-quantized": "weight_packed"}
    groups = said["config_groups"].values()
    assert {group["format"] for group in groups} == formats.keys()
    for group in groups:
        for module in group["targets"]:
            weight = theirs[f"{module}.{formats[group['format']]}"]
            assert torch.equal(weight.view(torch.uint8), ours[f"{module}.weight"].view(torch.uint8))


READ_BACK = [("biased", quant) for quant in EXPORT_CONFIGS]
READ_BACK += [("mixtral", "nvfp4"), ("qwen3-moe-dense", "mixed"), ("deepseek-v3", "w4a16_nvfp4")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "quant"), READ_BACK)
def test_our_own_reader_reads_what_is_meant(
    family: str, quant: str, layout: str, export: Exporter, tmp_path: Path
) -> None:
    path = export(family, quant, layout=layout)
    with pytest.raises(CheckpointError, match="pass --dequantize"):
        resolve_source(str(path), tmp_path)
    found = resolve_source(str(path), tmp_path, dequantize=True).tensors
    ours = export(family, quant)
    wanted = meant(load_file(ours / "model.safetensors"), EXPORT_CONFIGS[quant].quant_algo)
    assert found.infos.keys() == wanted.keys()
    slack = 2e-7 if layout == "compressed_tensors" else 0.0  # its divisors are rounded
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.read(name).float(), tensor.float(), rtol=slack, atol=0)


def test_modelopts_own_blocks_of_fp8_are_read(export: Exporter, tmp_path: Path) -> None:
    """`fp8_pb_wo`: the same numbers, the scale of four dimensions."""
    path = export("biased", "fp8_block")
    tensors = load_file(path / "model.safetensors")
    wanted = meant(tensors, "FP8_PB_WO")
    for name in [name for name in tensors if name.endswith(".weight_scale_inv")]:
        scale = tensors.pop(name)
        tensors[name.removesuffix("_inv")] = scale.unsqueeze(1).unsqueeze(3)
    (tmp_path / "theirs").mkdir()
    save(tensors, tmp_path / "theirs" / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json"):
        if (path / name).exists():
            (tmp_path / "theirs" / name).write_bytes((path / name).read_bytes())
    found = resolve_source(str(tmp_path / "theirs"), tmp_path, dequantize=True).tensors
    for name in linears(wanted):
        assert torch.equal(found.read(name), wanted[name]), name


@pytest.mark.parametrize(
    ("family", "quant"), [("biased", "w4a16_nvfp4"), ("mixtral", "nvfp4"), ("qwen2-moe", "mixed")]
)
def test_an_engine_of_what_was_read_back_gives_its_logits(
    family: str, quant: str, export: Exporter, tmp_path: Path
) -> None:
    """The CPU's torch in float32, beside transformers on the weights that the layout means."""
    path = export(family, quant)
    source = resolve_source(str(path), tmp_path, dequantize=True)
    engine = build_engine(
        source, tmp_path / "engine", backend="torch", dtype="float32", dequantize=True
    )
    assert read_engine(engine).manifest.verify is not None
    tensors = meant(load_file(path / "model.safetensors"), EXPORT_CONFIGS[quant].quant_algo)
    (tmp_path / "plain").mkdir()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    plain = {name: tensor.float() for name, tensor in tensors.items()}
    save(plain, tmp_path / "plain" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.tensor([5, 17, 300, 42, 7, 256, 99, 12])
    with torch.inference_mode():
        wanted = model(ids.unsqueeze(0), use_cache=False).logits[0]
    executor = TorchExecutor(
        read_engine(engine), ExecutorOptions(compute_dtype="float32", max_batch_size=1)
    )
    try:
        found = text_logits(executor, ids)
    finally:
        executor.close()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


REFUSED = [
    ({"quant": "nvfp4", "backend": "cpu"}, "no engine of backend=cpu holds; choose format=hf"),
    ({"quant": "mxfp8", "backend": "torch"}, "no engine of backend=torch holds"),
    ({"quant": "fp8_block", "backend": "tensorrt"}, "no engine of backend=tensorrt holds"),
    ({"quant": "w4a16_nvfp4", "backend": "tensorrt_llm"}, "no engine of backend=tensorrt_llm"),
    (
        {"quant": "int4_awq", "format": "hf", "layout": "compressed_tensors"},
        "no place in compressed-tensors' layout; choose layout=modelopt",
    ),
    ({"quant": "fp8", "layout": "compressed_tensors"}, "layout is of no use with format=trtllm"),
    (
        {"quant": "fp8_block", "format": "hf", "kv_cache_dtype": "fp8"},
        "kv_cache_dtype=fp8 with quant=fp8_block.*choose",
    ),
    ({"quant": "mixed", "format": "hf"}, "chosen by one limit; wanted effective_bits"),
    (
        {"quant": "mixed", "format": "hf", "max_kl": 0.1, "mixed_forms": "nvfp4,int4"},
        "mixed_forms='nvfp4,int4'; choose among nvfp4, w4a16_nvfp4, fp8",
    ),
    ({"quant": "fp8", "format": "hf", "max_kl": 0.1}, "of no use without quant=mixed"),
    ({"quant": "nvfp4", "format": "hf", "gpu": "h100"}, "does not run on h100.*choose quant among"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED)
def test_what_holds_no_such_form_refuses_it_by_name(
    values: dict[str, Any], sentence: str, family_source: SourceMaker
) -> None:
    with pytest.raises(PlanError, match=sentence):
        make_plan(load_settings({"dtype": "bfloat16", **values}), family_source("biased"))


def test_inputs_that_blocks_do_not_divide_are_refused(family_source: SourceMaker) -> None:
    source = family_source("biased")
    config = {**source.config, "intermediate_size": 264}
    source = replace(source, config=config, has_weights=False)
    values = {"quant": "mxfp8", "format": "hf", "dtype": "bfloat16", "until": "plan"}
    with pytest.raises(PlanError, match="mxfp8 has blocks of 32 inputs.*264 of mlp.proj; choose"):
        make_plan(load_settings(values), source)

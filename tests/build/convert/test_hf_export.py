"""`--format hf`: ModelOpt's own layout, and the TensorRT-LLM checkpoint's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.quantize.units import read_row
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.safetensors_file import SAFETENSORS_DTYPES, read_safetensors_header
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import SourceMaker, build_engine
from makers.family_models import FAMILIES
from makers.hf_checkpoints import (
    SHORT,
    Named,
    Tensors,
    choices,
    exported,
    meant,
    meant_with_factors,
    save,
)
from makers.paths import CONTRACT
from makers.quantized_writers import write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

MODELOPT = json.loads((CONTRACT / "hf" / "modelopt-0.47.json").read_text())


@pytest.mark.parametrize("case", MODELOPT["cases"])
def test_names_shapes_and_dtypes_are_modelopts(
    case: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    family, form = case.split(".")
    path = exported(family_source(family), tmp_path / "hf", **choices(form))
    wanted = MODELOPT["cases"][case]
    words = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}
    header = read_safetensors_header(path / "model.safetensors")
    found = {name: [words[item.dtype], list(item.shape)] for name, item in header.items()}
    assert found == wanted["tensors"]

    file = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    inline = json.loads((path / "config.json").read_text())["quantization_config"]
    theirs = wanted["hf_quant_config"]["quantization"]
    # ModelOpt does not name Gemma's embedding, whose class its quantisers do not know
    gemma = ["model.embed_tokens"] if family.startswith("gemma") else []
    excluded = sorted(theirs["exclude_modules"] + gemma)
    assert file == theirs | {"exclude_modules": excluded}
    # the group size stands in config.json too, for loaders that read nothing else
    groups = {key: file[key] for key in ("group_size", "has_zero_point", "pre_quant_scale")
              if key in file}  # fmt: skip
    more = {"ignore": excluded, "producer": inline["producer"], **groups}
    assert inline == wanted["quantization_config"] | more


def engine_linear(tensors: Tensors, module: str) -> Tensor:
    """The same of a TensorRT-LLM linear, without the factors of its input."""
    weight = tensors[f"{module}.weight"]
    scale = tensors.get(f"{module}.weights_scaling_factor")
    rows = tensors.get(f"{module}.per_channel_scale", scale)
    if weight.dtype == torch.float8_e4m3fn:
        assert rows is not None
        return (
            weight.float() * rows.unsqueeze(-1)
            if weight.ndim == 3
            else dequantize_fp8(weight, rows)
        )
    if weight.dtype == torch.int8:
        assert scale is not None
        return dequantize_int4(weight, scale)
    return weight


FORMS = ["none", "fp8", "fp8_kvfp8", "fp8_rowwise", "int4", "int4_awq", "w4a8_awq"]
CASES = [("biased", form) for form in FORMS]
CASES += [("phi3", form) for form in ("fp8", "fp8_rowwise", "int4", "int4_awq")]
CASES += [("mixtral", "fp8"), ("qwen3-moe", "fp8"), ("qwen2-tied", "fp8_rowwise")]
CASES += [("qwen3.5", form) for form in ("fp8", "fp8_rowwise", "int4")] + [("qwen3-next", "fp8")]
CASES += [("gpt-neox", "fp8"), ("gpt-neox", "fp8_rowwise"), ("gpt-neox", "fp8_kvfp8")]
CASES += [("gemma2", "fp8"), ("gemma3", "int4_awq"), ("qwen3", "w4a8_awq"), ("phimoe", "fp8")]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_both_formats_hold_the_same_numbers(
    family: str, form: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """The unified checkpoint, dequantised and put together as the family's table says, is the
    TensorRT-LLM checkpoint, dequantised: equal, not close.
    """
    source, settings = family_source(family), choices(form)
    engine = build_engine(source, tmp_path / "trt", until="convert", **SHORT, **settings)
    stored = load_file(exported(source, tmp_path / "hf", **settings) / "model.safetensors")
    config = read_config(engine)
    quantization = config.quantization
    back = replace(source, tensors=Named(meant(stored, quantization.quant_algo)), quantized=None)
    ours = load_file(engine / "rank0.safetensors")
    awq = quantization.pre_quant_scale
    compared = 0
    for row in stage_rows(config, 0):
        module, _, kind = row.target.rpartition(".")
        wanted = engine_linear(ours, module) if kind == "weight" else ours[row.target]
        if awq and is_folded(row.target, config):
            factors = ours[f"{linear_after(row.target)}.prequant_scaling_factor"].float()
            one = 1 if row.recipe == "plus_one" else 0
            origin = source.tensors.read(row.sources[0])
            origin = (origin if one else origin.to(torch.bfloat16)).float() + one
            folded = (origin * factors - one).bfloat16()
            assert torch.equal(stored[row.sources[0]], folded), row
        elif row.recipe == "plus_one":  # what one was added to is the source's own
            norm = stored[row.sources[0]]
            assert torch.equal(norm, source.tensors.read(row.sources[0]).to(norm.dtype)), row
        else:
            found = read_row(row, back, config)
            if module.endswith("router"):
                wanted = wanted.to(found.dtype)
            assert torch.equal(found, wanted), row
        compared += 1
        if kind == "weight":
            check_scales(ours, stored, module, row.sources, quantization.quant_algo, family)
    assert compared == len(stage_rows(config, 0))
    attention = "gpt_neox.layers.{}.attention" if "neox" in family else "model.layers.{}.self_attn"
    for layer in range(config.num_hidden_layers):
        scale = ours.get(f"transformer.layers.{layer}.attention.kv_cache_scaling_factor")
        assert (scale is not None) == (form == "fp8_kvfp8")
        for key in ("k_proj.k_scale", "v_proj.v_scale"):
            found_scale = stored.get(f"{attention.format(layer)}.{key}")
            assert found_scale is None if scale is None else found_scale == scale


def is_folded(target: str, config: ModelConfig) -> bool:
    """Whether a norm feeds q, k, v or gate, up and nothing else."""
    four = config.architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    mlp = "pre_feedforward_layernorm" if four else "post_layernorm"
    return target.endswith((".input_layernorm.weight", f".{mlp}.weight"))


def linear_after(norm: str) -> str:
    layer = norm.rsplit(".", 2)[0]
    return layer + (".attention.qkv" if "input_layernorm" in norm else ".mlp.fc")


def check_scales(
    ours: Tensors, stored: Tensors, module: str, sources: Any, algo: str | None, family: str
) -> None:
    """What does not enter the weight: scales of inputs, W4A8's second, factors of o and down;
    ones for Phi-3's fused linears, whose factors are in the norms.
    """
    for theirs, word in (
        ("activation_scaling_factor", "input_scale"),
        ("weights_scaling_factor_2", "weight_scale_2"),
    ):
        for source in sources:
            name = f"{source.removesuffix('.weight')}.{word}"
            wanted = ours.get(f"{module}.{theirs}")
            assert (wanted is None) == (name not in stored), name
            assert wanted is None or stored[name] == wanted, name
    for source in sources:
        name = f"{source.removesuffix('.weight')}.pre_quant_scale"
        own = module.endswith((".attention.dense", ".linear_attention.dense", ".mlp.proj"))
        fused = family == "phi3" and module.endswith((".attention.qkv", ".mlp.fc"))
        int4 = algo in ("W4A16_AWQ", "W4A8_AWQ")
        assert (name in stored) == (int4 and (own or fused)), name
        if name in stored:
            ones = torch.ones_like(stored[name])
            wanted = ours.get(f"{module}.prequant_scaling_factor", ones) if own else ones
            assert torch.equal(stored[name], wanted), name


def test_a_router_that_is_not_what_it_was_is_refused(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="into the router's weight.*choose format=trtllm"):
        exported(family_source("gemma4-moe"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gemma4-moe"}))
def test_an_unquantised_export_is_the_source(
    name: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """Through TensorRT-LLM's names and back: fused, reordered and shifted tensors, every family."""
    source = family_source(name)
    path = exported(source, tmp_path / "hf", dtype="float32" if name != "llama" else "auto")
    wanted, found = (load_file(p / "model.safetensors") for p in (source.path, path))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not (path / "hf_quant_config.json").exists()
    config = json.loads((path / "config.json").read_text())
    assert config.pop("torch_dtype") == source.config.get("dtype", source.config.get("torch_dtype"))
    kept = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    assert config == kept


@pytest.mark.parametrize("name", ["olmo2", "olmo", "starcoder2", "cohere", "gpt-neox"])
def test_factors_that_no_norm_takes_up_are_refused(
    name: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="no norms that feed one linear alone.*choose quant=int4"):
        exported(family_source(name), tmp_path / "hf", quant="int4_awq")


IDS = torch.tensor([5, 17, 300, 42, 7, 256, 99, 12, 480, 3, 77, 150])


@pytest.mark.parametrize("family", ["biased", "gemma2", "qwen3"])
def test_factors_in_the_norms_give_the_logits_of_factors_on_the_inputs(
    family: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """transformers on the dequantised export, and the engine of the same pass, in float32. The
    one difference is the norms' one rounding; the unfolded export would be far off.
    """
    source = family_source(family)
    settings: dict[str, Any] = {"quant": "int4_awq", "dtype": "float16", "verify_max_mean_kl": 50}
    path = exported(source, tmp_path / "hf", **settings)
    tensors = meant_with_factors(load_file(path / "model.safetensors"))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    config |= {key: "float32" for key in ("dtype", "torch_dtype")}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    save(tensors, tmp_path / "plain" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        wanted = model(IDS.unsqueeze(0), use_cache=False).logits[0]

    engine = build_engine(source, tmp_path / "engine", until="compile", **SHORT, **settings)
    executor = TorchExecutor(
        read_engine(engine), ExecutorOptions(compute_dtype="float32", max_batch_size=1)
    )
    try:
        hidden = executor.runner.model.hidden_states(IDS, torch.arange(len(IDS)), causal_attention)
        found = executor.runner.model.logits(hidden)
    finally:
        executor.close()
    assert float((found - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["gptq v1", "compressed-tensors fp8 static", "modelopt int4 awq"])
def test_a_quantised_source_passes_into_the_export_unrounded(kind: str, tmp_path: Path) -> None:
    pair = write_quantized(kind, tmp_path)
    source = resolve_source(str(pair.quantized), tmp_path)
    stored = load_file(exported(source, tmp_path / "hf") / "model.safetensors")
    found = meant_with_factors(stored) if "fp8" not in kind else meant(stored, "FP8")
    wanted = load_file(pair.plain / "model.safetensors")
    linears = [name for name in wanted if name.endswith("_proj.weight")]
    shared = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name in linears:
        weight = found[name]
        if kind == "modelopt int4 awq" and name.split(".")[-2] in shared:
            norm = "input" if "self_attn" in name else "post_attention"
            key = f"{name.rsplit('.', 3)[0]}.{norm}_layernorm.weight"
            weight = weight * stored[key].float() / wanted[key].float()  # what the norm took up
            torch.testing.assert_close(weight, wanted[name], rtol=2**-10, atol=1e-6)
        else:
            torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=0)


def test_excluded_modules_are_named_and_stay_as_they_are(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("biased")
    exclude = "*layers.1.mlp.proj,*layers.0.attention.qkv"
    path = exported(source, tmp_path / "hf", quant="int4_awq", exclude=exclude)
    config = json.loads((path / "hf_quant_config.json").read_text())
    left = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    left |= {"model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"}
    assert set(config["quantization"]["exclude_modules"]) == left
    stored = load_file(path / "model.safetensors")
    for name in [f"{module}.weight" for module in left] + ["model.layers.0.input_layernorm.weight"]:
        assert torch.equal(stored[name], source.tensors.read(name)), name
    assert "model.layers.1.mlp.down_proj.pre_quant_scale" not in stored
    assert "model.layers.0.mlp.down_proj.pre_quant_scale" in stored

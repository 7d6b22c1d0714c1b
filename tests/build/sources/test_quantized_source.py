"""Quantised Hugging Face checkpoints: what they mean, what becomes of them, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import EnginehouseError, PlanError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import build_engine
from makers.quantized_writers import INPUT_SCALE, KINDS, Pair, Written, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([1, 17, 300, 42, 5, 77, 410, 23, 8, 250, 111, 9])
LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def write(kind: str) -> Pair:
        if kind not in made:
            made[kind] = write_quantized(kind, tmp_path_factory.mktemp("quantized"))
        return made[kind]

    return write


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_reads_what_its_format_means(kind: str, pair: Callable[[str], Pair]) -> None:
    quantized, plain = pair(kind)
    source = opened(quantized)
    wanted = load_file(plain / "model.safetensors")
    assert {name for name in source.tensors.infos if name in wanted} == set(wanted)
    for name, tensor in wanted.items():
        assert source.tensors.infos[name].shape == tensor.shape
        torch.testing.assert_close(source.tensors.read(name).float(), tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_an_engine_holds_the_checkpoints_own_numbers(
    kind: str, tp: int, pp: int, pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    quantized, plain = pair(kind)
    engine = build_engine(opened(quantized), tmp_path / "out", tp=tp, pp=pp, until="convert")
    config = read_config(engine)
    form = KINDS[kind]
    assert config.quantization.has_zero_point == form.has_zero_point
    assert config.quantization.pre_quant_scale == ("awq" in form.form)
    weights = CheckpointWeights(engine, config)
    wanted = load_file(plain / "model.safetensors")
    for layer in range(2):
        tensors = weights(f"transformer.layers.{layer}.")
        for ours, theirs in LINEARS.items():
            found = {k[len(ours) + 1 :]: t for k, t in tensors.items() if k.startswith(f"{ours}.")}
            truth = torch.cat([wanted[f"model.layers.{layer}.{name}.weight"] for name in theirs])
            scale = found.get("weights_scaling_factor")
            if form.form == "int8":
                assert found["weight"].dtype == torch.int8
                back = found["weight"].float() * found["per_channel_scale"].float().view(-1, 1)
            elif form.form.startswith("fp8"):
                assert ("per_channel_scale" in found) == (form.form == "fp8_rowwise")
                scale = found.get("per_channel_scale", scale)
                assert scale is not None
                back = dequantize_fp8(found["weight"], scale)
            else:
                assert scale is not None
                back = dequantize_int4(found["weight"], scale, found.get("zero"))
                back = back * found.get("prequant_scaling_factor", torch.ones(1)).float()
            # a zero is the product of an integer and a scale, rounded to float16
            rounding = 2**-11 * found["zero"].float().abs().max() if "zero" in found else 0
            torch.testing.assert_close(back, truth, rtol=1e-6, atol=float(rounding))


def logits_of(engine: Path) -> torch.Tensor:
    options = ExecutorOptions(compute_dtype="float32", max_batch_size=1)
    executor = TorchExecutor(read_engine(engine), options)
    try:
        hidden = executor.runner.model.hidden_states(IDS, torch.arange(len(IDS)), causal_attention)
        return executor.runner.model.logits(hidden)
    finally:
        executor.close()


def logits_of_transformers(pair: Pair, form: str) -> torch.Tensor:
    """Of the dequantised checkpoint; under the FP8 forms each linear's input is rounded too, and
    under W4A8, times its factors.
    """
    model = AutoModelForCausalLM.from_pretrained(pair.plain, dtype=torch.float32)
    stored = load_file(pair.quantized / "model.safetensors")

    def rounded(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        dynamic = x.abs().amax(dim=-1, keepdim=True) / 448
        scale = dynamic if form == "fp8_rowwise" else torch.tensor(INPUT_SCALE)
        multiplier = factor / scale
        if form == "w4a8_awq":  # one number in the engine, of the model's dtype
            multiplier = multiplier.half().float()
        entering = (x * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return entering * scale / factor

    for name, module in model.named_modules():
        if name.endswith("_proj") and form.startswith(("fp8", "w4a8")):
            factor = stored.get(f"{name}.pre_quant_scale", torch.ones(1)).float()
            module.register_forward_pre_hook(lambda _, args, f=factor: (rounded(args[0], f),))
        if name.endswith("_proj") and form == "w4a8_awq":  # the kernel's scales are of float16
            home, _, word = name.rpartition(".")
            qkv = ("q_proj", "k_proj", "v_proj")
            second = max(
                stored[f"{home}.{one}.weight_scale_2"] for one in (qkv if word in qkv else (word,))
            )
            scale = stored[f"{name}.weight_scale"]
            ratio = (scale / second).half().float() * second / scale
            module.weight.data *= ratio.repeat_interleave(128, dim=1)
    with torch.inference_mode():
        logits: torch.Tensor = model(IDS.unsqueeze(0)).logits[0]
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_answers_as_transformers_with_the_dequantised_weights(
    kind: str, pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    quantized, _ = pair(kind)
    flags = [str(quantized), "-o", str(tmp_path / "engine"), "--tp", "2", "--quiet"]
    limits = ["--max-batch-size", "8", "--max-num-tokens", "64"]
    assert cli.main([*flags, *limits]) == 0, "verified against the dequantised source"
    verified = read_engine(tmp_path / "engine").manifest.verify
    form = KINDS[kind]
    rounds = form.form.startswith(("fp8", "w4a8"))
    assert verified is not None and verified["mean_kl"] < (0.05 if rounds else 1e-3)
    wanted = logits_of_transformers(pair(kind), form.form)
    found = logits_of(tmp_path / "engine")
    # a value between two FP8 numbers may fall to either; zero points are rounded to float16
    tolerance = 0.05 if rounds else 1e-2 if form.has_zero_point else 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_the_engines_scales_are_the_checkpoints_bit_for_bit(
    pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    """float32 scales of GPTQ stay float32 beside a float16 model."""
    engine = build_engine(opened(pair("gptq v2").quantized), tmp_path / "e", until="convert")
    stored = load_file(pair("gptq v2").quantized / "model.safetensors")
    with safe_open(engine / "rank0.safetensors", framework="pt") as file:
        for layer in range(2):
            scale = file.get_tensor(f"transformer.layers.{layer}.mlp.fc.weights_scaling_factor")
            truth = stored[f"model.layers.{layer}.mlp.gate_proj.scales"]
            assert scale.dtype == torch.float32 and torch.equal(scale, truth.T)


def swap_groups(tensors: Written) -> None:
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0)


def swap_packed_groups(tensors: Written) -> None:
    index = (torch.arange(512, dtype=torch.int32) // 64).flip(0)
    tensors["model.layers.1.mlp.down_proj.weight_g_idx"] = index


def move_zero(tensors: Written) -> None:
    tensors["model.layers.0.mlp.up_proj.qzeros"][0, 0] += 1


def unquantise_one(tensors: Written) -> None:
    module = "model.layers.1.self_attn.q_proj"
    for key in ("qweight", "qzeros", "scales"):
        del tensors[f"{module}.{key}"]
    tensors[f"{module}.weight"] = torch.zeros(256, 256, dtype=torch.float16)


def unquantise_the_gate(tensors: Written) -> None:
    module = "model.layers.0.mlp.gate_proj"
    for key in ("qweight", "qzeros", "scales"):
        del tensors[f"{module}.{key}"]
    tensors[f"{module}.weight"] = torch.zeros(512, 256, dtype=torch.float16)


def quantise_the_router(tensors: Written) -> None:
    for key in ("qweight", "qzeros", "scales"):
        tensors[f"mlp.gate.{key}"] = tensors[f"model.layers.0.mlp.up_proj.{key}"].clone()


def quantise_nothing(tensors: Written) -> None:
    for name in [name for name in tensors if name.endswith((".qweight", ".scales"))]:
        module = name.rpartition(".")[0]
        rows = {"k_proj": 128, "v_proj": 128, "gate_proj": 512, "up_proj": 512}
        out, inn = rows.get(module.rpartition(".")[2], 256), 512 if "down" in module else 256
        tensors.pop(name), tensors.pop(f"{module}.qzeros", None)
        tensors[f"{module}.weight"] = torch.zeros(out, inn, dtype=torch.float16)


def drop_scale(tensors: Written) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def spoil_scale(tensors: Written) -> None:
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")


def spoil_fp8(tensors: Written) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[5, 5] = 0xFF


def split_factor(tensors: Written) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        factor = torch.full((256,), 2.0 if name == "v_proj" else 1.0)
        tensors[f"model.layers.0.self_attn.{name}.pre_quant_scale"] = factor


def drop_input_scale(tensors: Written) -> None:
    del tensors["model.layers.0.mlp.up_proj.input_scale"]


def block_scales(tensors: Written) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(4, 2)


def wrong_groups(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name][:2]


def wrong_zeros(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    tensors[name] = tensors[name].T


def wide_words(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = tensors[name].long()


def shift_int8(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_zero_point"] = torch.full((512, 1), 3, dtype=torch.int8)


def smooth(tensors: Written) -> None:
    tensors["model.layers.1.mlp.down_proj.pre_quant_scale"] = torch.ones(512)


def widen_int8(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].short()


def drop_second_scale(tensors: Written) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_2"]


STORED: dict[str, tuple[str, Callable[[Written], None], str]] = {
    "act-order": ("gptq v1", swap_groups, "down_proj.g_idx puts inputs into groups out of order"),
    "act-order, packed": (
        "compressed-tensors w4a16",
        swap_packed_groups,
        "down_proj.weight_g_idx puts inputs into groups out of order",
    ),
    "wrongly symmetric": ("gptq v1", move_zero, "zero points other than 8"),
    "half of q, k, v": ("awq", unquantise_one, "q_proj is not quantised while .*k_proj is"),
    "gate alone": ("awq", unquantise_the_gate, "gate_proj is not quantised while .*up_proj is"),
    "a stranger": ("awq", quantise_the_router, "mlp.gate is quantised, but is no part of a Llama"),
    "nothing": ("awq", quantise_nothing, "quantised as AutoAWQ, but none is"),
    "no scale": ("modelopt fp8", drop_scale, "up_proj.weight_scale is missing from the FP8"),
    "NaN scale": ("awq", spoil_scale, "up_proj.scales holds NaN"),
    "NaN FP8": ("modelopt fp8", spoil_fp8, "layers.1.mlp.up_proj.weight holds NaN"),
    "factors": ("modelopt int4 awq", split_factor, "v_proj and .*q_proj have different pre_quant"),
    "no input scale": ("modelopt fp8", drop_input_scale, "up_proj.input_scale is missing"),
    "blocks": ("modelopt fp8", block_scales, "no kernel for blocks of FP8"),
    "zeros": (
        "compressed-tensors w4a16 asymmetric",
        wrong_zeros,
        r"zero_point has shape \[4, 64\]; .* give \[64, 4\]",
    ),
    "INT8 zeros": ("compressed-tensors int8", shift_int8, "holds other numbers than zeros, for wh"),
    "INT8 factors": ("modelopt int8", smooth, "down_proj.pre_quant_scale multiplies the inputs"),
    "INT8 groups": ("modelopt int8", block_scales, r"has shape \[4, 2\]; wanted one scale, or one"),
    "INT8 dtype": ("compressed-tensors int8", widen_int8, "dtype torch.int16; wanted int8"),
    "W4A8 second": (
        "modelopt w4a8 awq",
        drop_second_scale,
        "weight_scale_2 is missing; wanted one",
    ),
    "W4A8 input": ("modelopt w4a8 awq", drop_input_scale, "up_proj.input_scale is missing"),
    "words": ("gptq v2", wide_words, "up_proj.qweight has dtype torch.int64; wanted int32"),
    "gemv": (
        "awq gemv g64",
        wrong_groups,
        r"shape \[2, 16\] and qzeros \[512, 2\]",
    ),
    "groups": ("awq", wrong_groups, r"has shape \[2, 512\]; groups of 64 of 256 inputs"),
}


@pytest.mark.parametrize("case", STORED)
def test_a_checkpoint_that_no_engine_holds_is_refused_in_a_sentence(
    case: str, tmp_path: Path
) -> None:
    kind, edit, wanted = STORED[case]
    quantized, _ = write_quantized(kind, tmp_path / "in", edit)
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        build_engine(opened(quantized), tmp_path / "out", until="convert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("awq", {"quant": "fp8"}, "quantised already, and stays in the form int4; leave quant out"),
        ("awq", {"quant": "none"}, "stays in the form int4"),
        ("modelopt fp8", {"quant": "int4"}, "stays in the form fp8; leave quant out"),
        ("awq", {"group_size": 128}, "group_size=128 is not the checkpoint's own, 64"),
        ("awq", {"tp": 8, "pad": False}, "the source has no other; legal tp for it: 1, 2, 4$"),
        ("awq g128", {"tp": 4, "pad": False}, "no other; legal tp for it: 1, 2$"),
        ("awq", {"gpu": "b200"}, "above SM90; choose gpu among a30, .*gh200, or the unquantised"),
        ("awq", {"gpu": "h100", "kv_cache_dtype": "fp8"}, "choose kv_cache_dtype among auto, int8"),
        ("awq", {"kv_cache_dtype": "fp8"}, "choose kv_cache_dtype=auto$"),
        (
            "modelopt int8",
            {"backend": "tensorrt_llm"},
            "makes INT8 of 16-bit .* choose backend=cpu",
        ),
        ("modelopt int8", {"backend": "tensorrt", "gpu": "a100"}, "is in INT8 already"),
        (
            "modelopt int8",
            {"format": "hf"},
            "quant=int8 has no layout in a Hugging Face checkpoint",
        ),
    ],
)
def test_only_the_checkpoints_own_form_is_allowed(
    kind: str, settings: dict[str, Any], wanted: str, pair: Callable[[str], Pair]
) -> None:
    source = opened(pair(kind).quantized)
    with pytest.raises(PlanError, match=wanted):
        make_plan(load_settings(settings), source)


def test_naming_the_checkpoints_own_form_is_the_same_as_leaving_it_out(
    pair: Callable[[str], Pair],
) -> None:
    source = opened(pair("awq").quantized)
    named = make_plan(load_settings({"quant": "int4", "group_size": 64}), source)
    assert named.config == make_plan(load_settings({}), source).config
    assert named.settings.quant == "int4"


def test_the_plan_page_lists_the_cuts_of_the_sources_own_groups(
    pair: Callable[[str], Pair], capsys: pytest.CaptureFixture[str]
) -> None:
    legal = []
    for kind in ("awq", "awq g128"):
        assert cli.main([str(pair(kind).quantized), "--plan"]) == 0
        page = capsys.readouterr().out
        legal += [line.split(None, 2)[2] for line in page.splitlines() if "legal TP" in line]
    assert [line.strip() for line in legal] == ["1, 2, 4", "1, 2"]

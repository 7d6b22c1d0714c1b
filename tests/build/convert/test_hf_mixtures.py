"""`--format hf` of mixtures: the linears of experts, their scales, and what enters them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from enginehouse.build.forms.block_floats import unpack_e2m1
from enginehouse.build.progress import BuildProgress
from enginehouse.build.quantize.calibration import calibration_sequences
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from makers.engines import SourceMaker, build_engine
from makers.family_models import save_family
from makers.hf_checkpoints import SHORT, Tensors, exported, meant, save

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = {"dtype": "bfloat16"}
NVFP4 = {"quant": "nvfp4", **BF16}


def expert(layer: int, number: int, word: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{word}"


def test_an_experts_scales_are_its_own_and_gate_and_up_share_them(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    """weight_scale_2 is the largest magnitude of gate and up together / (6 * 448)."""
    source = family_source("mixtral")
    stored = load_file(exported(source, tmp_path / "hf", **NVFP4) / "model.safetensors")
    seconds = set()
    for layer in range(2):
        for number in range(4):
            for words in (("w1", "w3"), ("w2",)):
                names = [expert(layer, number, word) for word in words]
                weights = [source.tensors.read(f"{name}.weight") for name in names]
                wanted = max(float(weight.abs().max()) for weight in weights) / (6 * 448)
                found = {float(stored[f"{name}.weight_scale_2"]) for name in names}
                (one,) = found
                assert one == pytest.approx(wanted, rel=1e-6)
                seconds.add(one)
    assert len(seconds) == 16


def test_experts_are_rounded_to_the_nearest_in_no_worse_blocks_than_the_largest_gives(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("mixtral")
    path = exported(source, tmp_path / "hf", quant="w4a16_nvfp4", **BF16)
    stored = load_file(path / "model.safetensors")
    assert not any(name.endswith("input_scale") for name in stored)
    for word in ("w1", "w2", "w3"):
        name = expert(1, 2, word)
        weight = source.tensors.read(f"{name}.weight").float().unflatten(1, (-1, 16))
        second = float(stored[f"{name}.weight_scale_2"])
        step = stored[f"{name}.weight_scale"].float().unsqueeze(-1) * second
        q = unpack_e2m1(stored[f"{name}.weight"]).unflatten(1, (-1, 16))
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        grid = torch.cat([-grid, grid])
        error = (q * step - weight).abs()
        nearest = (weight.unsqueeze(-1) - grid * step.unsqueeze(-1)).abs().amin(-1)
        torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-7)
        usual = (weight.abs().amax(-1, keepdim=True) / 6 / second).to(torch.float8_e4m3fn).float()
        plain = weight.unsqueeze(-1) - grid * (usual * second).unsqueeze(-1)
        plain_error = plain.abs().amin(-1).square().sum(-1)
        assert bool((error.square().sum(-1) <= plain_error * (1 + 1e-5)).all())


def plain_model(weights: Tensors, path: Path, folder: Path) -> Any:
    """transformers' model of these weights."""
    folder.mkdir()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save(weights, folder / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_what_enters_an_expert_is_scaled_as_its_own_tokens_are(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    """The calibration text through transformers' model of the quantised weights: each expert's
    largest magnitude / (6 * 448), of what it is given and of what it makes of it.
    """
    source = family_source("mixtral")
    path = exported(source, tmp_path / "hf", **NVFP4)
    stored = load_file(path / "model.safetensors")
    weights = {name: source.tensors.read(name) for name in source.tensors.infos}
    quantised = meant(stored, "NVFP4").items()
    weights |= {name: t for name, t in quantised if f"{name}_scale" in stored}
    model = plain_model(weights, path, tmp_path / "plain")
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    settings = SHORT["calib_samples"], SHORT["calib_length"], source.bos_token_id
    (ids,) = calibration_sequences(path, *settings)
    with torch.inference_mode():
        model(ids.unsqueeze(0), use_cache=False)
    for layer, x in enumerate(states[0] for states in seen):
        router = weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        chosen = (x @ router.T).topk(2).indices
        for number in range(4):
            tokens = x[(chosen == number).any(-1)]
            gate, up = (
                tokens @ weights[f"{expert(layer, number, word)}.weight"].T for word in ("w1", "w3")
            )
            made = torch.nn.functional.silu(gate) * up
            for words, entering in (("w1", tokens), ("w3", tokens), ("w2", made)):
                found = float(stored[f"{expert(layer, number, words)}.input_scale"])
                assert found == pytest.approx(float(entering.abs().max()) / (6 * 448), rel=1e-4)


@pytest.fixture
def lonely(tmp_path: Path) -> SourceCheckpoint:
    """A mixture whose expert 2 no token chooses."""
    path = save_family("minimax-m2", tmp_path / "lonely")
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(names) == 2
    for name in names:
        tensors[name][2] = -100.0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(path)


def test_an_expert_that_saw_no_token_is_scaled_as_its_layers_largest_and_it_is_said(
    lonely: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(BuildProgress, "note", lambda self, text: said.append(text))
    stored = load_file(exported(lonely, tmp_path / "hf", **NVFP4) / "model.safetensors")
    for layer in range(2):
        for word in ("w1", "w2"):
            scales = [float(stored[f"{expert(layer, n, word)}.input_scale"]) for n in range(4)]
            others = [scale for number, scale in enumerate(scales) if number != 2]
            assert scales[2] == max(others) > min(others)
    assert [line for line in said if line.startswith("2 expert(s) saw no token")]


@pytest.mark.parametrize("quant", ["int4", "fp8_rowwise"])
def test_experts_of_compressed_tensors_alone_are_those_of_our_own_engine(
    quant: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("qwen3-moe")
    layout = {"layout": "compressed_tensors", **BF16}
    path = exported(source, tmp_path / "hf", quant=quant, **layout)
    found = resolve_source(str(path), tmp_path, dequantize=True).tensors
    engine = build_engine(source, tmp_path / "engine", quant=quant, until="convert", **BF16)
    ours = load_file(engine / "rank0.safetensors")
    prefix = "transformer.layers.1.mlp.fc"
    weight = ours[f"{prefix}.weight"]
    if quant == "int4":
        nibbles = torch.stack([(weight << 4) >> 4, weight >> 4], dim=2).flatten(1, 2)
        scale = ours[f"{prefix}.weights_scaling_factor"].float()
        wanted = nibbles.float() * scale.repeat_interleave(64, dim=-1)
    else:
        wanted = weight.float() * ours[f"{prefix}.per_channel_scale"].unsqueeze(-1)
    for number in range(4):
        names = [
            f"model.layers.1.mlp.experts.{number}.{word}_proj.weight" for word in ("up", "gate")
        ]
        assert torch.equal(torch.cat([found.read(name) for name in names]), wanted[number])


def test_of_a_mixture_all_experts_of_a_layer_are_in_one_form(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    """Runtimes run them as one, and the router is in none."""
    source = family_source("qwen3-moe")
    path = exported(source, tmp_path / "hf", quant="mixed", effective_bits=6.0, **BF16)
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    layers = said["quantized_layers"]
    assert not any(name.endswith("mlp.gate") for name in layers)
    forms = []
    for layer in range(2):
        own = [
            layers[n]["quant_algo"] for n in layers if n.startswith(f"model.layers.{layer}.mlp.")
        ]
        assert len(own) in (0, 12)
        assert len(set(own)) <= 1
        forms += own
    assert forms

"""`--format hf` of families whose own tensors hold all experts of a layer, and such files read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.verify import text_logits
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import CheckpointError, PlanError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import SourceMaker, build_engine
from makers.hf_checkpoints import E2M1, Tensors, exported, meant, save

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = {"dtype": "bfloat16"}
COMPRESSED = {"layout": "compressed_tensors", **BF16}
HOMES = {"llama4": "model.layers.1.feed_forward.experts", "gpt-oss": "model.layers.1.mlp.experts"}
LOSSES = {"fp8": 0.04, "nvfp4": 0.15, "w4a16_nvfp4": 0.15}


def stack_meant(tensors: Tensors, name: str) -> Tensor:
    """A stack of ModelOpt's in float32: a byte of e2m1 holds two inputs, the even one low."""
    q, scale = tensors[name], tensors[f"{name}_weight_scale"]
    if q.dtype == torch.float8_e4m3fn:
        assert scale.shape == ()
        return q.float() * scale
    data = q.numpy()
    codes = np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1, data.shape[2])
    values = E2M1[codes & 7] * np.where(codes & 8, -1, 1).astype(np.float32)
    second = tensors[f"{name}_weight_scale_2"]
    assert second.shape == ()
    each = np.repeat((scale.float() * second).numpy(), 16, axis=1)
    return torch.from_numpy(values * each)


@pytest.mark.parametrize("quant", LOSSES)
@pytest.mark.parametrize("family", HOMES)
def test_a_stack_means_the_familys_own_and_is_read_back(
    family: str, quant: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """In its own order: inputs before outputs, and GPT-OSS's gate and up in turns."""
    source = family_source(family)
    path = exported(source, tmp_path / "hf", quant=quant, **BF16)
    stored = load_file(path / "model.safetensors")
    back = resolve_source(str(path), tmp_path, dequantize=True).tensors
    assert back.infos.keys() == source.tensors.infos.keys()
    for word in ("gate_up_proj", "down_proj"):
        name = f"{HOMES[family]}.{word}"
        wanted, found = source.tensors.read(name), stack_meant(stored, name)
        assert float((found - wanted).norm() / wanted.norm()) < LOSSES[quant]
        assert torch.equal(back.read(name), found)
        assert torch.equal(back.read(name, slice(1, 3)), found[1:3])
        assert (f"{name}_input_scale" in stored) == (quant != "w4a16_nvfp4")
        largest = float(wanted.abs().max()) / (448 if quant == "fp8" else 6 * 448)
        scale = stored[f"{name}_weight_scale{'' if quant == 'fp8' else '_2'}"]
        assert float(scale) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize(
    "quant", ["fp8", "fp8_rowwise", "int4", "w4a16_nvfp4", "mxfp8", "fp8_block"]
)
def test_llama_4s_experts_stand_one_by_one_in_compressed_tensors_layout(
    quant: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("llama4")
    path = exported(source, tmp_path / "hf", quant=quant, **COMPRESSED)
    stored = load_file(path / "model.safetensors")
    home, other = HOMES["llama4"], "weight_packed" if quant in ("int4", "w4a16_nvfp4") else "weight"
    words = ("gate_proj", "up_proj", "down_proj")
    linears = {f"{home}.{number}.{word}" for number in range(4) for word in words}
    assert linears == {n.rpartition(".")[0] for n in stored if n.startswith(home)}
    assert all(f"{linear}.{other}" in stored for linear in linears)
    back = resolve_source(str(path), tmp_path, dequantize=True).tensors
    assert back.infos.keys() == source.tensors.infos.keys()
    limit = {"int4": 0.15, "w4a16_nvfp4": 0.15}.get(quant, 0.04)
    for word in ("gate_up_proj", "down_proj"):
        wanted, found = source.tensors.read(f"{home}.{word}"), back.read(f"{home}.{word}")
        assert float((found - wanted).norm() / wanted.norm()) < limit
    if quant in ("fp8", "fp8_rowwise"):
        plain = meant(stored, None)
        parts = [plain[f"{home}.2.{word}.weight"] for word in ("gate_proj", "up_proj")]
        assert torch.equal(back.read(f"{home}.gate_up_proj")[2], torch.cat(parts).T)


@pytest.mark.parametrize("layout", ["modelopt", "compressed_tensors"])
def test_granites_experts_stand_one_by_one_under_the_names_of_its_loader(
    layout: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("granite-moe")
    path = exported(source, tmp_path / "hf", quant="fp8", layout=layout, **BF16)
    stored = load_file(path / "model.safetensors")
    block = "model.layers.1.block_sparse_moe"
    names = {f"{block}.experts.{n}.w{i}" for n in range(4) for i in (1, 2, 3)}
    assert {n.rpartition(".")[0] for n in stored if f"{block}." in n} - names == {
        f"{block}.router.layer"
    }
    plain = meant({name: tensor for name, tensor in stored.items()}, "FP8")
    own = load_file(source.path / "model.safetensors")
    gate, up = own[f"{block}.input_linear.weight"][3].chunk(2)
    for word, wanted in (("w1", gate), ("w3", up), ("w2", own[f"{block}.output_linear.weight"][3])):
        found = plain[f"{block}.experts.3.{word}.weight"]
        assert float((found - wanted).norm() / wanted.norm()) < LOSSES["fp8"]
    back = resolve_source(str(path), tmp_path, dequantize=True).tensors
    assert back.infos.keys() == source.tensors.infos.keys()


def test_experts_that_are_left_out_stay_the_familys_stack(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("granite-moe")
    path = exported(source, tmp_path / "hf", quant="fp8", exclude="*mlp.fc,*mlp.proj", **BF16)
    stored, own = (load_file(p / "model.safetensors") for p in (path, source.path))
    stacks = [name for name in own if "_linear" in name]
    assert len(stacks) == 4
    assert all(torch.equal(stored[name], own[name].bfloat16()) for name in stacks)
    said = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name.removesuffix(".weight") for name in stacks} <= set(said)


def test_an_engine_of_gpt_oss_that_was_read_back_gives_its_logits(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    """Beside transformers on the stacks that the layout means, in float32."""
    path = exported(family_source("gpt-oss"), tmp_path / "hf", quant="w4a16_nvfp4", **BF16)
    source = resolve_source(str(path), tmp_path, dequantize=True)
    choices: dict[str, Any] = {"backend": "torch", "dtype": "float32", "dequantize": True}
    engine = build_engine(source, tmp_path / "engine", **choices)
    stored = load_file(path / "model.safetensors")
    plain = {name: tensor.float() for name, tensor in meant(stored, "W4A16_NVFP4").items()}
    plain |= {name: tensor.float() for name, tensor in stored.items() if name.endswith("sinks")}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        plain[name] = stack_meant(stored, name)
    (tmp_path / "plain").mkdir()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    save({name: t.contiguous() for name, t in plain.items()}, tmp_path / "plain/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
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


def one_by_one(source_path: Path, folder: Path) -> Path:
    """A GPT-OSS as llm-compressor writes it in FP8: each expert's linears, and their biases."""
    folder.mkdir()
    tensors = load_file(source_path / "model.safetensors")
    for layer in range(2):
        home = f"model.layers.{layer}.mlp.experts"
        both, down = (tensors.pop(f"{home}.{word}_proj") for word in ("gate_up", "down"))
        biases = [tensors.pop(f"{home}.{word}_proj_bias") for word in ("gate_up", "down")]
        for n in range(4):
            parts = {
                "gate": (both[n, :, 0::2].T, biases[0][n, 0::2]),
                "up": (both[n, :, 1::2].T, biases[0][n, 1::2]),
                "down": (down[n].T, biases[1][n]),
            }
            for word, (weight, bias) in parts.items():
                scale = weight.abs().amax(1, keepdim=True) / 448
                module = f"{home}.{n}.{word}_proj"
                tensors[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
                tensors[f"{module}.weight_scale"] = scale
                tensors[f"{module}.bias"] = bias.clone()
    save({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source_path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"weights": scheme, "input_activations": None, "targets": ["Linear"]}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    (folder / "tokenizer.json").write_bytes((source_path / "tokenizer.json").read_bytes())
    return folder


def test_experts_of_gpt_oss_one_by_one_are_read_as_its_stack(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("gpt-oss")
    path = one_by_one(source.path, tmp_path / "theirs")
    back = resolve_source(str(path), tmp_path, dequantize=True).tensors
    assert back.infos.keys() == source.tensors.infos.keys()
    for name in source.tensors.infos:
        wanted, found = source.tensors.read(name), back.read(name)
        assert found.shape == back.infos[name].shape == wanted.shape
        if name.endswith(("gate_up_proj", "down_proj")):
            assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.03
        else:
            assert torch.equal(found, wanted), name


def test_an_expert_that_is_missing_is_said(family_source: SourceMaker, tmp_path: Path) -> None:
    path = one_by_one(family_source("gpt-oss").path, tmp_path / "theirs")
    tensors = load_file(path / "model.safetensors")
    lost = "model.layers.0.mlp.experts.1.up_proj"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    save(kept, path / "model.safetensors")
    source = resolve_source(str(path), tmp_path, dequantize=True)
    with pytest.raises(CheckpointError, match="experts that make model.layers.0.*not all there"):
        make_plan(load_settings({"dequantize": True, **BF16}), source)


REFUSED = [
    (
        "gpt-oss",
        {"quant": "fp8", "layout": "compressed_tensors"},
        "no runtime loads its experts one",
    ),
    ("gpt-oss", {"quant": "mxfp8"}, "which runtimes load in FP8 and NVFP4 alone; choose none, fp8"),
    ("llama4", {"quant": "fp8_block"}, "NVFP4 alone; choose .*, or layout=compressed_tensors"),
    ("llama4", {"quant": "mixed", "effective_bits": 6.0}, "quant=mixed with layout=modelopt"),
]


@pytest.mark.parametrize(("family", "values", "sentence"), REFUSED)
def test_what_no_runtime_loads_is_refused(
    family: str, values: dict[str, Any], sentence: str, family_source: SourceMaker
) -> None:
    with pytest.raises(PlanError, match=sentence):
        make_plan(load_settings({**BF16, "format": "hf", **values}), family_source(family))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_half_of_a_layers_experts_is_not_left_out(family: str, family_source: SourceMaker) -> None:
    """Of an engine it may be, as each of its products has a form of its own."""
    settings = {"quant": "fp8", "exclude": "*mlp.proj", **BF16}
    source = family_source(family)
    words = r"layers\.0\.mlp\.proj without .*\.mlp\.fc; .* format=hf .*: exclude both$"
    with pytest.raises(PlanError, match=words):
        make_plan(load_settings({**settings, "format": "hf"}), source)
    make_plan(load_settings({**settings, "backend": "torch"}), source)

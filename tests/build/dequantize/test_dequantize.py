"""--dequantize: a quantised checkpoint is a source of every form, and the plan says what is rounded
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from enginehouse.build import cli
from enginehouse.build.dequantize.integers import GptqForm
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import EnginehouseError
from makers.engines import build_engine, write_tiny_checkpoint
from makers.quantized_writers import KINDS, Pair, Written, write_quantized
from makers.stored_forms import STORED

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]
LLAMA = ", ".join(
    f"model.layers.*.{module}"
    for module in (
        *("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
        *("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
    )
)


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path, dequantize=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def write(kind: str) -> Pair:
        if kind not in made:
            made[kind] = write_quantized(kind, tmp_path_factory.mktemp("quantized"))
        return made[kind]

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantised_source_holds_what_its_format_means(
    kind: str, pair: Callable[[str], Pair]
) -> None:
    quantized, plain = pair(kind)
    source = opened(quantized)
    wanted = load_file(plain / "model.safetensors")
    assert source.quantized is None and source.dequantized is not None
    assert {name for name in source.tensors.infos if name in wanted} == set(wanted)
    for name, tensor in wanted.items():
        assert source.tensors.infos[name].shape == tensor.shape
        torch.testing.assert_close(source.tensors.read(name).float(), tensor, rtol=1e-6, atol=0)
        rows = slice(3, 7)
        part = source.tensors.read(name, rows).float()
        torch.testing.assert_close(part, tensor[rows], rtol=1e-6, atol=0)
    make_plan(load_settings({"quant": "int4"}), source)


@pytest.mark.parametrize(
    ("kind", "quant"),
    [("modelopt fp8", "int4"), ("gptq v1 asymmetric", "fp8"), ("modelopt int4 awq", "int8")],
)
def test_an_engine_of_another_form_is_that_of_the_weights_that_are_meant(
    kind: str, quant: str, pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    """Byte for byte the engine that the float32 checkpoint gives."""
    quantized, plain = pair(kind)
    choices = {"quant": quant, "dtype": "float16", "until": "convert"}
    ours = build_engine(opened(quantized), tmp_path / "a", **choices)
    theirs = build_engine(resolve_source(str(plain), plain), tmp_path / "b", **choices)
    found, wanted = (
        CheckpointWeights(path, read_config(path))("transformer.") for path in (ours, theirs)
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        raw = tensor.contiguous().view(torch.uint8)
        assert torch.equal(found[name].contiguous().view(torch.uint8), raw), name


def test_the_plan_and_the_manifest_say_what_is_rounded_twice(
    pair: Callable[[str], Pair], tmp_path: Path, capsys: Capture
) -> None:
    quantized, _ = pair("modelopt fp8")
    flags = [str(quantized), "--dequantize", "--quant", "int4"]
    assert cli.main([*flags, "--plan"]) == 0
    out, error = capsys.readouterr()
    twice = "rounded twice, to FP8 and then to int4 (to float16 where the engine has no such form)"
    assert f"{LLAMA}: {twice}" in error and "dequantised" in out
    limits = ["--max-batch-size", "8", "--max-num-tokens", "64"]
    assert cli.main([*flags, *limits, "-o", str(tmp_path / "e")]) == 0, "verified"
    assert twice in capsys.readouterr().err
    manifest = read_engine(tmp_path / "e").manifest
    assert manifest.choices["dequantize"] is True and manifest.choices["quant"] == "int4"
    assert manifest.source["dequantized"] == "FP8"
    assert manifest.verify is not None and manifest.verify["mean_kl"] > 0
    assert cli.main([*flags, *limits, "-o", str(tmp_path / "e")]) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_config_file_may_ask_for_it(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dequantize: true\nquant: none\n")
    settings = load_settings({}, tmp_path / "c.yaml")
    source = opened(pair("awq").quantized)
    sentences = [
        make_plan(load_settings({"dtype": dtype}, tmp_path / "c.yaml"), source).rounded_twice
        for dtype in ("auto", "float32")
    ]
    assert settings.dequantize and sentences == [
        f"{LLAMA}: rounded twice, to AutoAWQ and then to float16",
        f"{LLAMA}: dequantised from AutoAWQ and held in float32 as they are",
    ]


def test_a_config_alone_is_planned(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((pair("awq").quantized / "config.json").read_text())
    plan = make_plan(load_settings({"quant": "fp8", "until": "plan"}), opened(tmp_path))
    assert plan.rounded_twice is not None
    assert plan.rounded_twice.startswith("every quantised linear: rounded twice, to AutoAWQ and")


def test_scales_of_an_fp8_kv_cache_are_left_out_and_said_so(tmp_path: Path) -> None:
    def edit(tensors: Written) -> None:
        for layer in range(2):
            for word in ("k", "v"):
                name = f"model.layers.{layer}.self_attn.{word}_proj.{word}_scale"
                tensors[name] = torch.tensor(0.02)

    path = write_quantized("modelopt fp8", tmp_path, edit, kv_cache_quant_algo="FP8").quantized
    source = opened(path)
    plan = make_plan(load_settings({"quant": "fp8"}), source)
    assert plan.config.quantization.kv_cache_quant_algo is None
    assert "the scales of the checkpoint's FP8 KV cache are left out" in source.remarks[-1]


@pytest.mark.parametrize("kind", ["half of q, k, v", "act-order"])
def test_what_no_engine_holds_names_the_flag_and_is_read_with_it(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    module = "model.layers.1.self_attn.q_proj"

    def edit(tensors: Written) -> None:
        if kind == "act-order":
            tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0)
            return
        for key in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            del tensors[f"{module}.{key}"]
        tensors[f"{module}.weight"] = torch.zeros(256, 256, dtype=torch.float16)

    path = write_quantized("gptq v1", tmp_path / "m", edit).quantized
    flags = [str(path), "-o", str(tmp_path / "e"), "--quiet", "--until", "convert"]
    assert cli.main(flags) == 2
    error = capsys.readouterr().err
    assert "pass --dequantize" in error and error.count("\n") == 1
    assert cli.main([*flags, "--dequantize", "--quant", "int4"]) == 0


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda path: write_tiny_checkpoint(path / "m"), "m is not quantised: leave dequantize"),
        (
            lambda path: build_engine(
                resolve_source(str(write_tiny_checkpoint(path / "m")), path),
                path / "e",
                quant="int4",
                until="convert",
            ),
            "is a TensorRT-LLM checkpoint, which is read in its own form only: leave dequantize",
        ),
        (lambda path: path / "x.gguf", "x.gguf is always dequantised: leave dequantize out"),
    ],
)
def test_where_there_is_nothing_to_dequantise_the_flag_is_refused(
    make: Callable[[Path], Path], wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(EnginehouseError, match=wanted):
        opened(make(tmp_path))


def test_a_symmetric_checkpoint_may_leave_its_zero_points_out(tmp_path: Path) -> None:
    def edit(tensors: Written) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            del tensors[name]

    path, plain = write_quantized("awq symmetric", tmp_path, edit)
    wanted = load_file(plain / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = opened(path).tensors.read("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_the_highest_code_of_a_zero_point_in_gptq_stands_for_the_number_after_it() -> None:
    """As kernels read it: 256 of 8 bits, which no byte holds."""
    packed = torch.full((1, 8), -1, dtype=torch.int32)  # 4 inputs, each 255
    tensors = {
        "m.qweight": packed,
        "m.qzeros": packed[:, :2],
        "m.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    source = SimpleNamespace(
        infos={name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()},
        read=lambda name: tensors[name],
    )
    weight = GptqForm(8, -1, symmetric=False, stored_zero=1).read(source, "m")
    assert torch.equal(weight, torch.full((8, 4), -1.0))


def drop_scale(tensors: Written) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def spoil_fp8(tensors: Written) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[5, 5] = 0xFF


def spoil_scale(tensors: Written) -> None:
    tensors["model.layers.1.mlp.up_proj.weight_scale"].fill_(float("nan"))


def cut_scales(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = tensors[name][:1]


def wide_words(tensors: Written) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = tensors[name].long()


def strange_group(tensors: Written) -> None:
    tensors["model.layers.0.mlp.up_proj.g_idx"][7] = 99


def move_zero(tensors: Written) -> None:
    tensors["model.layers.0.mlp.up_proj.qzeros"][0, 0] += 1


DAMAGED: list[tuple[str, Callable[[Written], None], str]] = [
    ("modelopt fp8", drop_scale, "up_proj.weight_scale is missing from the FP8 checkpoint"),
    ("modelopt fp8", spoil_fp8, "layers.1.mlp.up_proj.weight holds NaN"),
    ("modelopt fp8", spoil_scale, "layers.1.mlp.up_proj.weight_scale holds NaN"),
    ("awq", cut_scales, r"up_proj.scales has shape \[1, 512\]; .* give \[4, 512\]"),
    ("gptq v2", wide_words, "up_proj.qweight has dtype torch.int64; wanted int32"),
    ("gptq v1", strange_group, "up_proj.g_idx names groups other than 0 to 3"),
    ("gptq v1", move_zero, "up_proj has zero points other than 8, but"),
]


@pytest.mark.parametrize(("kind", "edit", "wanted"), DAMAGED)
def test_a_damaged_checkpoint_is_one_sentence_and_leaves_nothing(
    kind: str, edit: Callable[[Written], None], wanted: str, tmp_path: Path
) -> None:
    path = write_quantized(kind, tmp_path / "in", edit).quantized
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        build_engine(opened(path), tmp_path / "out" / "e", quant="int4", until="convert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_config_that_belongs_to_other_weights_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = KINDS["awq"].config
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EnginehouseError, match="quantised as AutoAWQ, but none is"):
        make_plan(load_settings({}), opened(path))


def test_it_is_verified_with_what_transformers_dequantises(tmp_path: Path) -> None:
    """transformers' own reading of blocks of FP8, which it holds in the checkpoint's 16 bit."""
    path = write_quantized("deepseek fp8", tmp_path, kinds=STORED).quantized
    exact = {"dtype": "float32", "compute_dtype": "float32", "verify_with": "transformers"}
    engine = build_engine(opened(path), tmp_path / "e", dequantize=True, quant="none", **exact)
    verified = read_engine(engine).manifest.verify
    assert verified is not None and verified["mean_kl"] < 1e-4

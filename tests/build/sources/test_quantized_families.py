"""Quantised checkpoints of other families than Llama, and those quantised only in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.build import cli
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import CheckpointError, EnginehouseError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import build_engine
from makers.family_models import load_family, logits_of
from makers.quantized_writers import KINDS, LINEARS, Pair, Written, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [1, 17, 300, 42, 5, 77, 410, 23, 8, 250, 111, 9]
FP8 = ("modelopt fp8", "compressed-tensors fp8 static")
CASES = [
    *(("phi3", kind) for kind in KINDS if kind not in ("awq g128", "modelopt w4a8 awq")),
    *((family, kind) for family in ("mixtral", "qwen3-moe") for kind in FP8),
    ("phimoe", "modelopt fp8"),
    ("qwen3", "gptq v1 asymmetric"),
    ("gemma2", "awq"),
    *(("qwen3.5", kind) for kind in (*FP8, "gptq v1 asymmetric")),
    ("qwen3-next", "modelopt fp8"),
    *(("gpt-neox", kind) for kind in ("awq", "compressed-tensors fp8 dynamic")),
]


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path)


def meant(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's weights in float32, whatever form each is in."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        extra = {k: tensors.get(f"{module}.{k}") for k in ("weights_scaling_factor", "zero")}
        scale = tensors.get(f"{module}.per_channel_scale", extra["weights_scaling_factor"])
        if kind != "weight":
            continue
        if f"{module}.per_channel_scale" in tensors and tensor.dtype == torch.int8:
            assert scale is not None
            found[name] = tensor.float() * scale.float().view(-1, 1)
        elif tensor.dtype == torch.int8:
            assert scale is not None
            factor = tensors.get(f"{module}.prequant_scaling_factor", torch.ones(1))
            found[name] = dequantize_int4(tensor, scale, extra["zero"]) * factor.float()
        elif tensor.dtype == torch.float8_e4m3fn:
            assert scale is not None
            found[name] = dequantize_fp8(tensor, scale)
        else:
            found[name] = tensor.float()
    return found


def assert_same_weights(pair: Pair, folder: Path, engine: Path) -> None:
    """An engine of the quantised checkpoint means what one of the float32 checkpoint holds."""
    config = read_config(engine)
    plain = build_engine(opened(pair.plain), folder, dtype="float32", until="convert")
    wanted, found = CheckpointWeights(plain, read_config(plain)), CheckpointWeights(engine, config)
    for prefix in ("transformer.layers.0.", "transformer.layers.1.", "lm_head."):
        theirs, ours = wanted(prefix), found(prefix)
        rounding = max((float(t.abs().max()) for k, t in ours.items() if "zero" in k), default=0)
        again = meant(ours)
        assert again.keys() == {name for name in theirs if name.endswith("weight")}
        for name, tensor in again.items():
            # 16-bit tensors and zeros are rounded to float16
            torch.testing.assert_close(
                tensor, theirs[name].float(), rtol=2**-11, atol=2**-11 * rounding + 1e-7, msg=name
            )


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_engine_of_the_family_holds_the_checkpoints_own_numbers(
    family: str, kind: str, tp: int, pp: int, tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path / "in", family=family)
    engine = build_engine(opened(pair.quantized), tmp_path / "e", tp=tp, pp=pp, until="convert")
    assert read_config(engine).quantization.quant_algo is not None
    assert_same_weights(pair, tmp_path / "plain", engine)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("phi3", "awq"), ("phi3", "compressed-tensors fp8 dynamic"), ("mixtral", "modelopt fp8")],
)
def test_the_engine_is_verified_against_the_dequantised_source(
    family: str, kind: str, tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path / "in", family=family)
    flags = [str(pair.quantized), "-o", str(tmp_path / "e"), "--tp", "2", "--quiet"]
    assert cli.main([*flags, "--max-batch-size", "8", "--max-num-tokens", "64"]) == 0
    verified = read_engine(tmp_path / "e").manifest.verify
    assert verified is not None and verified["mean_kl"] < (0.05 if "fp8" in kind else 1e-3)


def test_a_mixture_takes_the_largest_scale_of_what_enters_its_experts(tmp_path: Path) -> None:
    def spread(tensors: Written) -> None:
        for expert in range(4):
            for i, name in enumerate(("w1", "w2", "w3")):
                key = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.input_scale"
                tensors[key] = torch.tensor(0.01 * (expert + 1) + 0.1 * i)

    pair = write_quantized("modelopt fp8", tmp_path / "in", spread, family="mixtral")
    engine = build_engine(opened(pair.quantized), tmp_path / "e", tp=2, until="convert")
    layer = CheckpointWeights(engine, read_config(engine))("transformer.layers.1.")
    assert float(layer["mlp.fc.activation_scaling_factor"]) == pytest.approx(0.24)
    assert float(layer["mlp.proj.activation_scaling_factor"]) == pytest.approx(0.14)
    assert layer["mlp.fc.weights_scaling_factor"].shape == (4, 1)


@pytest.mark.parametrize(
    ("family", "kind", "wanted"),
    [
        ("mixtral", "awq", "experts.0.w3 is an expert in AutoAWQ; experts are read in"),
        ("qwen3-moe", "gptq v1", "experts.0.up_proj is an expert in GPTQ"),
        ("qwen3-moe", "compressed-tensors w4a16", "an expert in compressed-tensors W4A"),
        ("mixtral", "modelopt int4 awq", "an expert in ModelOpt INT4 AWQ"),
        ("mixtral", "compressed-tensors int8", "an expert in INT8; experts are read in FP8 only"),
        ("mixtral", "compressed-tensors fp8 dynamic", "scales activations token by token"),
        (
            "mixtral",
            "compressed-tensors fp8, a scale each",
            "q_proj and .*k_proj and .*v_proj do not share one scale",
        ),
    ],
)
def test_a_mixture_that_no_engine_holds_is_refused_in_a_sentence(
    family: str, kind: str, wanted: str, tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path / "in", family=family)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        build_engine(opened(pair.quantized), tmp_path / "e", until="convert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("quantised", "left_out"),
    [
        (".experts.", {"*attention.qkv", "*attention.dense"}),
        ("self_attn", {"*mlp.fc", "*mlp.proj"}),
    ],
)
def test_experts_or_attention_alone_may_be_quantised(
    quantised: str, left_out: set[str], tmp_path: Path
) -> None:
    pair = write_quantized(
        "compressed-tensors fp8 static",
        tmp_path / "in",
        family="mixtral",
        quantises=lambda module: module.endswith(LINEARS) and quantised in module,
    )
    engine = build_engine(opened(pair.quantized), tmp_path / "e", tp=2, pp=2, until="convert")
    patterns = read_config(engine).quantization.exclude_modules
    assert patterns is not None and left_out < set(patterns)
    assert_same_weights(pair, tmp_path / "plain", engine)


def but(*left_out: str) -> Callable[[str], bool]:
    return lambda module: module.endswith(LINEARS) and not any(w in module for w in left_out)


PARTS: list[tuple[str, Callable[[str], bool], int, list[str]]] = [
    ("awq", but(".0."), 1, [f"transformer.layers.0.{m}" for m in ("attention.dense",)]),
    ("awq", but("down_proj"), 2, ["*mlp.proj"]),
    ("gptq v2", but("1.mlp.gate_proj", "1.mlp.up_proj"), 1, ["transformer.layers.1.mlp.fc"]),
    ("compressed-tensors w4a16", but("o_proj"), 2, ["*attention.dense"]),
    ("modelopt fp8", but("1.self_attn"), 1, ["transformer.layers.1.attention.qkv"]),
    ("compressed-tensors fp8 dynamic", but("0.mlp"), 1, ["transformer.layers.0.mlp.gate"]),
    ("compressed-tensors int8", but("1.mlp.down"), 1, ["transformer.layers.1.mlp.proj"]),
    ("modelopt w4a8 awq", but("o_proj"), 2, ["*attention.dense"]),
]


@pytest.mark.parametrize(("kind", "quantises", "pp", "patterns"), PARTS)
def test_linears_that_were_left_out_are_excluded(
    kind: str, quantises: Callable[[str], bool], pp: int, patterns: list[str], tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path / "in", quantises=quantises)
    engine = build_engine(opened(pair.quantized), tmp_path / "e", tp=2, pp=pp, until="convert")
    excluded = read_config(engine).quantization.exclude_modules
    assert excluded is not None and {"*lm_head", *patterns} <= set(excluded)
    assert_same_weights(pair, tmp_path / "plain", engine)


def test_a_partly_quantised_engine_answers_as_transformers(tmp_path: Path) -> None:
    pair = write_quantized("awq symmetric", tmp_path / "in", quantises=but("0.mlp", "1.self_attn"))
    engine = build_engine(opened(pair.quantized), tmp_path / "e", until="compile")
    options = ExecutorOptions(compute_dtype="float32", max_batch_size=1)
    executor = TorchExecutor(read_engine(engine), options)
    ids = torch.tensor(IDS)
    hidden = executor.runner.model.hidden_states(ids, torch.arange(len(ids)), causal_attention)
    truth = logits_of(load_family(pair.plain), IDS)
    torch.testing.assert_close(executor.runner.model.logits(hidden), truth, rtol=0, atol=1e-3)


def test_a_stage_that_would_differ_names_the_legal_pp(tmp_path: Path) -> None:
    pair = write_quantized("awq", tmp_path / "in", quantises=but("1.mlp.down_proj"))
    with pytest.raises(EnginehouseError, match="mlp.proj of layers 1 .* pp=2 .* choose pp in 1$"):
        build_engine(opened(pair.quantized), tmp_path / "e", pp=2, until="convert")


def test_a_partly_quantised_engine_is_cut_again(tmp_path: Path) -> None:
    """Layers that stages count in the same way come back; others are refused as above."""
    pair = write_quantized("awq", tmp_path / "in", quantises=but("down_proj", "0.self_attn.o"))
    one, other = tmp_path / "one", tmp_path / "other"
    build_engine(opened(pair.quantized), one, until="convert")
    with pytest.raises(EnginehouseError, match="attention.dense of layers 0 .* choose pp in 1$"):
        build_engine(opened(one), other, pp=2, until="convert")
    build_engine(opened(one), other, tp=2, until="convert")
    assert_same_weights(pair, tmp_path / "plain", other)


@pytest.mark.parametrize(
    "kind", ["awq", "gptq v1", "modelopt fp8", "modelopt int4 awq", "modelopt int8"]
)
def test_a_quantised_lm_head_is_written_in_16_bit(kind: str, tmp_path: Path) -> None:
    pair = write_quantized(
        kind, tmp_path / "in", quantises=lambda m: m.endswith((*LINEARS, "lm_head"))
    )
    engine = build_engine(opened(pair.quantized), tmp_path / "e", tp=2, until="convert")
    head = CheckpointWeights(engine, read_config(engine))("lm_head.")["weight"]
    assert head.dtype == torch.float16
    assert_same_weights(pair, tmp_path / "plain", engine)


def test_a_quantised_lm_head_of_a_tied_model_is_kept(tmp_path: Path) -> None:
    pair = write_quantized("awq", tmp_path, quantises=lambda m: m.endswith((*LINEARS, "lm_head")))
    untied = build_engine(opened(pair.quantized), tmp_path / "untied", until="convert")
    path = pair.quantized / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = build_engine(opened(pair.quantized), tmp_path / "tied", until="convert")
    for name in ("config.json", "rank0.safetensors"):
        assert (tied / name).read_bytes() == (untied / name).read_bytes()

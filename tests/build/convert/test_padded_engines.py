"""Engines of models that TP does not divide: padded, and the same in every form and backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from doubles.network_runner import NetworkRunner
from doubles.trtllm_double import install_double, trtllm_build
from enginehouse.build import cli
from enginehouse.build.plan.build_plan import BuildPlan, make_plan
from enginehouse.build.plan.cuts import cut_model
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import dequantize_int4, unpack_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.torch.decoder import Decoder, causal_attention
from makers.engines import build_engine
from makers.family_models import load_family, logits_of, save_family
from makers.quantized_writers import write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

NORMED_TOGETHER = {"olmo2", "olmo3", "olmoe", "minimax-m2"}  # all heads: none can be added
# Of each way in which a family's tensors are fused, biased or normed.
OF_ALL_KINDS = (
    *("llama", "qwen2", "qwen3", "phi3", "gemma3", "starcoder2", "cohere", "glm4", "phi", "olmo"),
    *("gpt-neox", "mixtral", "qwen3-moe", "gpt-oss", "phimoe-tied"),
)

Sources = Callable[..., SourceCheckpoint]
# Two query heads for each of three KV heads, and columns that few numbers divide.
ODD: dict[str, Any] = dict(
    hidden_size=192, num_attention_heads=6, num_key_value_heads=3, intermediate_size=200
)
NINE: dict[str, Any] = dict(num_attention_heads=9, hidden_size=288)
IDS = [7 * i % 500 + 3 for i in range(40)]
CLOSE = dict(atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def odd_source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """odd_source("qwen3", num_attention_heads=9): a tiny checkpoint, made once."""
    made: dict[str, SourceCheckpoint] = {}

    def make(name: str, **sizes: Any) -> SourceCheckpoint:
        key = f"{name} {sizes}"
        if key not in made:
            experts = {"moe_intermediate_size": 40} if name.startswith("qwen3-moe") else {}
            path = tmp_path_factory.mktemp("odd") / name
            save_family(name, path, **{**ODD, **experts, **sizes})
            made[key] = resolve_source(str(path), path)
        return made[key]

    return make


def converted(source: SourceCheckpoint, path: Path, **settings: Any) -> Path:
    return build_engine(source, path, **{"until": "convert", "dtype": "float32", **settings})


def merged(path: Path) -> tuple[ModelConfig, CheckpointWeights]:
    config = read_config(path)
    return config, CheckpointWeights(path, config)


def engine_logits(path: Path, ids: list[int] = IDS) -> torch.Tensor:
    """float32 [tokens, vocab_size] of the merged ranks."""
    model = Decoder(*merged(path), torch.float32)
    hidden = model.hidden_states(torch.tensor(ids), torch.arange(len(ids)), causal_attention)
    return model.logits(hidden)


def plan_of(source: SourceCheckpoint, **settings: Any) -> BuildPlan:
    return make_plan(load_settings(settings), source)


@pytest.mark.parametrize("name", OF_ALL_KINDS)
def test_merged_ranks_equal_transformers_at_every_tp(
    odd_source: Sources, name: str, tmp_path: Path
) -> None:
    source = odd_source(name, **NINE)
    truth = logits_of(load_family(source.path), IDS)
    for tp in range(1, 9):
        path = converted(source, tmp_path / f"tp{tp}", tp=tp)
        config = read_config(path)
        assert config.num_attention_heads % tp == 0 and config.moe_intermediate_size % tp == 0
        torch.testing.assert_close(engine_logits(path), truth, **CLOSE)


@pytest.mark.parametrize("name", sorted(NORMED_TOGETHER))
def test_heads_that_are_normed_together_are_cut_and_not_padded(
    odd_source: Sources, name: str, tmp_path: Path
) -> None:
    source = odd_source(name, **NINE)
    path = converted(source, tmp_path / "tp3", tp=3)
    truth = logits_of(load_family(source.path), IDS)
    torch.testing.assert_close(engine_logits(path), truth, **CLOSE)
    for tp in (2, 4):
        with pytest.raises(PlanError, match="legal tp for none: 1, 3, 9: choose one"):
            plan_of(source, tp=tp)


def test_what_is_added_is_zeros_at_the_end_of_groups(odd_source: Sources, tmp_path: Path) -> None:
    """TP 8: three KV heads become four, each on two ranks, and their three heads four."""
    source = odd_source("llama", **NINE)
    config, weights = merged(converted(source, tmp_path / "e", tp=8))
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 4)
    assert json.loads((tmp_path / "e" / "config.json").read_text())["head_size"] == 32
    layer = weights("transformer.layers.1.")
    names = {word: f"model.layers.1.self_attn.{word}_proj.weight" for word in "qkvo"}
    theirs = {word: source.tensors.read(name) for word, name in names.items()}
    q, k, v = layer["attention.qkv.weight"].view(-1, 32, 288).split([16, 4, 4])
    real = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert torch.equal(q[real].flatten(0, 1), theirs["q"])
    assert torch.equal(k[:3].flatten(0, 1), theirs["k"])
    assert torch.equal(v[:3].flatten(0, 1), theirs["v"])
    added = [i for i in range(16) if i not in real]
    assert not q[added].any() and not k[3].any() and not v[3].any()
    dense = layer["attention.dense.weight"].view(288, 16, 32)
    assert torch.equal(dense[:, real].flatten(1), theirs["o"]) and not dense[:, added].any()
    assert config.intermediate_size == 200


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "gemma3", "mixtral", "qwen3-moe"])
def test_fp8_is_the_unpadded_models_to_the_last_bit(
    odd_source: Sources, name: str, tmp_path: Path
) -> None:
    source, form = odd_source(name, **NINE), dict(quant="fp8")
    plain = converted(source, tmp_path / "e1", **form)
    wanted = merged(plain)[1]("transformer.layers.1.")
    truth = engine_logits(plain)
    for tp in (4, 7, 8):
        path = converted(source, tmp_path / f"e{tp}", tp=tp, **form)
        found = merged(path)[1]("transformer.layers.1.")
        padding = plan_of(source, dtype="float32", quant="fp8", tp=tp).padding
        assert padding.applies("attention.qkv.weight")
        for key, tensor in found.items():
            if key.endswith("weight") and tensor.dtype == torch.float8_e4m3fn:
                tensor = padding.unpad(key, tensor.view(torch.uint8))
                assert torch.equal(tensor, wanted[key].view(torch.uint8)), key
            elif key.endswith("scaling_factor"):
                assert torch.equal(tensor, wanted[key]), key
        torch.testing.assert_close(engine_logits(path), truth, **CLOSE)


@pytest.mark.parametrize("quant", ["int4", "int4_awq", "fp8_rowwise"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "qwen2"])
def test_other_forms_answer_as_the_unpadded_model(
    odd_source: Sources, name: str, quant: str, tmp_path: Path
) -> None:
    """Whose two heads are just one group of 64, so that INT4's groups are the same. fp8_rowwise
    scales a token by its largest number, which no added head changes.
    """
    source, form = odd_source(name, intermediate_size=256), dict(quant=quant)
    plain = converted(source, tmp_path / "e1", **form)
    assert plan_of(source, quant=quant).config.num_attention_heads == 6
    truth = engine_logits(plain)
    for tp in (4, 8):
        path = converted(source, tmp_path / f"e{tp}", tp=tp, **form)
        if quant != "int4_awq":
            torch.testing.assert_close(engine_logits(path), truth, **CLOSE)
            continue
        # Sums over zeros too differ in their last bit, which decides a rounding in later layers.
        padding = plan_of(source, dtype="float32", quant=quant, tp=tp).padding
        first, found = (merged(each)[1]("transformer.layers.0.") for each in (plain, path))
        for name in (key for key in found if key.endswith("qkv.weight")):
            assert torch.equal(
                padding.unpad(name, unpack_int4(found[name])), unpack_int4(first[name])
            )
        name = "attention.dense.weight"
        assert torch.equal(padding.unpad(name, found[name]), first[name])


@pytest.mark.parametrize("quant", ["int4", "int4_awq", "w4a8_awq"])
@pytest.mark.parametrize("tp", [1, 4])
def test_groups_that_lie_otherwise_still_hold_the_weights(
    odd_source: Sources, quant: str, tp: int, tmp_path: Path
) -> None:
    """Three heads of 64 to a KV head and 200 columns: groups of 128 are nowhere whole."""
    source = odd_source("qwen3", num_attention_heads=9, hidden_size=256, head_dim=64)
    form = dict(quant=quant, group_size=128)
    with pytest.raises(PlanError, match="does not fit"):
        plan_of(source, pad=False, **form)
    path = converted(source, tmp_path / "e", tp=tp, **form)
    plan = plan_of(source, dtype="float32", tp=tp, **form)
    layer = merged(path)[1]("transformer.layers.1.")
    for module, name in {
        "attention.dense": "self_attn.o_proj",
        "mlp.proj": "mlp.down_proj",
    }.items():
        scale = layer[f"{module}.weights_scaling_factor"]
        back = dequantize_int4(layer[f"{module}.weight"], scale)
        factor = layer.get(f"{module}.prequant_scaling_factor", torch.ones(back.shape[1]))
        weight = source.tensors.read(f"model.layers.1.{name}.weight")
        found = plan.padding.unpad(f"{module}.weight", back * factor)
        assert float((found - weight).norm() / weight.norm()) < 0.2
        added = plan.padding.pad(f"{module}.weight", torch.ones_like(weight)) == 0
        assert added.any() and not back[added].any()
        assert (factor[added[0]] == 1).all() and (scale > 0).all()
    assert engine_logits(path).isfinite().all()


@pytest.mark.parametrize("quant", ["none", "int4", "fp8_rowwise"])
@pytest.mark.parametrize("tp", [4, 8])
def test_the_native_network_runs_the_padded_model(
    odd_source: Sources, quant: str, tp: int, tmp_path: Path
) -> None:
    source = odd_source("gemma2" if quant == "none" else "llama", intermediate_size=256)
    path = converted(source, tmp_path / "e", quant=quant, tp=tp)
    runner = NetworkRunner(path, 64, batch=1)
    found = runner.logits([torch.tensor(IDS)], 3, chunk=16)[0]
    wanted = engine_logits(path)[-4:]
    difference = float((found - wanted).abs().max() / wanted.std())
    # each rank scales its own part of a token in fp8_rowwise
    assert difference < (0.5 if quant == "fp8_rowwise" else 1e-4)


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8_rowwise", "int4", "int4_awq", "int8"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_strict_double_takes_a_padded_checkpoint(
    odd_source: Sources, name: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_double(monkeypatch)
    from tensorrt_llm.build_command import check_tensors
    from tensorrt_llm.tables import check_config

    source = odd_source(name, hidden_size=768, head_dim=32)
    settings = dict(quant=quant, tp=4, backend="tensorrt_llm", dtype="bfloat16")
    path = converted(source, tmp_path / "c", max_num_tokens=None, **settings)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_attention_heads"], config["head_size"]) == (8, 32)
    check_config(config)
    for rank in range(4):
        check_tensors(config, rank, load_file(path / f"rank{rank}.safetensors"))
    if (name, quant) == ("llama", "fp8"):
        assert trtllm_build(path, tmp_path / "engine").returncode == 0


def test_tensorrt_llms_phi3_repeats_kv_heads_as_it_can_have_no_more_heads(
    odd_source: Sources, tmp_path: Path
) -> None:
    """It takes the head size from hidden_size and the heads: so at TP 4 each of three KV heads
    stands four times, for one head each.
    """
    sizes = dict(num_attention_heads=12, num_key_value_heads=3, hidden_size=384)
    source = odd_source("phi3", **sizes)
    settings = dict(tp=4, backend="tensorrt_llm", dtype="bfloat16")
    config = plan_of(source, **settings).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 12)
    path = converted(source, tmp_path / "e", **{**settings, "dtype": "float32"})
    truth = logits_of(load_family(source.path), IDS)
    torch.testing.assert_close(engine_logits(path), truth, **CLOSE)
    with pytest.raises(PlanError, match="cannot be cut over tp=5, .* none can be added; legal tp"):
        plan_of(source, **{**settings, "tp": 5})
    assert plan_of(source, tp=5).config.num_attention_heads == 20


@pytest.mark.parametrize(
    "kind",
    ["awq", "gptq v1", "gptq v2", "modelopt int4 awq", "modelopt fp8", "modelopt fp8 per channel"],
)
def test_a_source_that_is_quantised_already_is_padded_as_it_is(kind: str, tmp_path: Path) -> None:
    """8 heads of 32 on 4 KV heads: at TP 3 its groups of 64 are whole heads."""
    quantized, _ = write_quantized(kind, tmp_path)
    source = resolve_source(str(quantized), tmp_path)
    truth = engine_logits(converted(source, tmp_path / "e1", dtype="float16"))
    path = converted(source, tmp_path / "e3", dtype="float16", tp=3)
    config = read_config(path)
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 6)
    torch.testing.assert_close(engine_logits(path), truth, **CLOSE)


def test_a_quantised_source_whose_groups_would_be_parted_is_refused(
    odd_source: Sources,
) -> None:
    """Groups of 128 are two heads of 64, and each KV head has three."""
    sizes = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=64, hidden_size=512)
    config = plan_of(odd_source("qwen3", intermediate_size=512, **sizes), tp=2).config
    assert cut_model(config, "int4", 128).config.num_attention_heads == 8
    with pytest.raises(PlanError, match="part the groups of 128 .*; legal tp for int4: 1$"):
        cut_model(config, "int4", 128, own=True)


def test_a_checkpoint_folder_is_padded_when_it_is_cut_again(
    odd_source: Sources, tmp_path: Path
) -> None:
    source = odd_source("llama")
    folder = resolve_source(str(converted(source, tmp_path / "e1")), tmp_path)
    direct = converted(source, tmp_path / "direct", tp=4)
    again = converted(folder, tmp_path / "again", tp=4)
    for rank in range(4):
        name = f"rank{rank}.safetensors"
        assert (again / name).read_bytes() == (direct / name).read_bytes()


def test_a_padded_engine_is_verified_and_kept_while_the_choice_is_the_same(
    odd_source: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = odd_source("qwen2-tied")
    words = [str(source.path), "-o", str(tmp_path / "e"), "--tp", "4", "--dtype", "float32"]
    words += ["--compute-dtype", "float32"]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "; padded for TP 4: 6 -> 8 heads, 3 -> 4 KV heads, +" in said
    manifest = read_engine(tmp_path / "e").manifest
    assert manifest.verify is not None and manifest.verify["mean_kl"] < 1e-6
    assert manifest.choices["pad"] is True
    assert cli.main([*words, "--pad"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert cli.main([*words, "--no-pad"]) == 2
    error = capsys.readouterr().err
    assert "num_key_value_heads=3 cannot be cut over tp=4; choose tp in 1" in error
    assert "padding is the default" in error and error.count("\n") == 1


def test_the_choice_is_kept_only_where_it_has_an_effect(
    odd_source: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine of before there was a choice, or of --no-pad, is not built again."""
    source = odd_source("llama")
    words = [str(source.path), "-o", str(tmp_path / "e"), "--until", "compile", "--quiet"]
    assert cli.main([*words, "--no-pad"]) == 0
    assert "pad" not in read_engine(tmp_path / "e").manifest.choices
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_hugging_face_checkpoint_is_never_padded(odd_source: Sources) -> None:
    source = odd_source("llama")
    assert "mlp.fc has out_features=200 per rank at tp=1" in refusal_of(
        source, quant="int4", format="hf"
    )
    assert plan_of(source, quant="fp8", format="hf").config.intermediate_size == 200
    assert "tp=2 pp=1 is of no use" in refusal_of(source, tp=2, format="hf")


def refusal_of(source: SourceCheckpoint, **settings: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(source, **settings)
    return str(caught.value)


def test_int4_of_a_hidden_size_that_tensorrt_llm_would_pad_is_refused_for_it(
    odd_source: Sources,
) -> None:
    """192 is no multiple of 4 x 64; other backends have no such rule."""
    source = odd_source("llama")
    said = refusal_of(source, quant="int4", tp=4, backend="tensorrt_llm", dtype="bfloat16")
    assert "hidden_size=192" in said and "no multiple of 256" in said
    assert "legal tp for int4: 1, 3:" in said
    assert plan_of(source, quant="int4", tp=4).group_size == 64
    assert "more ranks than the MLP has columns" in refusal_of(source, tp=201)

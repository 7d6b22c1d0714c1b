"""shard -> merge is the identity for every tensor, every TP, and shapes that do not divide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.runtime.checkpoint.sharding import (
    Cut,
    merge_tensors,
    shard_piece,
    shard_tensor,
    tensor_cut,
)
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.errors import EngineError

LAYER = "transformer.layers.0."


def config(tp: int, heads: int = 8, kv_heads: int = 4, vocab: int = 101) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="float32",
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=4,
        intermediate_size=48,
        norm_epsilon=1e-5,
        max_position_embeddings=64,
    ).with_mapping(Mapping(tp))


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element different (as far as the dtype goes), so that any mix-up shows."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def tensors(c: ModelConfig) -> dict[str, Tensor]:
    qkv, hidden, inner = c.qkv_size, c.hidden_size, c.intermediate_size
    query = c.num_attention_heads * c.head_size
    return {
        "transformer.vocab_embedding.weight": numbered(c.vocab_size, hidden),
        "lm_head.weight": numbered(c.vocab_size, hidden),
        "transformer.ln_f.weight": numbered(hidden),
        LAYER + "input_layernorm.weight": numbered(hidden),
        LAYER + "attention.qkv.weight": numbered(qkv, hidden),
        LAYER + "attention.qkv.bias": numbered(qkv),
        LAYER + "attention.qkv.per_channel_scale": numbered(qkv),
        LAYER + "attention.qkv.weights_scaling_factor": numbered(qkv, 2),
        LAYER + "attention.qkv.prequant_scaling_factor": numbered(hidden),
        LAYER + "attention.dense.weight": numbered(hidden, query),
        LAYER + "attention.dense.bias": numbered(hidden),
        LAYER + "attention.dense.per_channel_scale": numbered(hidden),
        LAYER + "attention.dense.weights_scaling_factor": numbered(hidden, 8),
        LAYER + "attention.dense.prequant_scaling_factor": numbered(query),
        LAYER + "mlp.fc.weight": numbered(inner, hidden),
        LAYER + "mlp.gate.weight": numbered(inner, hidden),
        LAYER + "mlp.proj.weight": numbered(hidden, inner),
        LAYER + "mlp.proj.activation_scaling_factor": numbered(1),
        LAYER + "mlp.proj.weights_scaling_factor": numbered(1),
        LAYER + "attention.kv_cache_scaling_factor": numbered(1),
    }


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_merging_the_shards_gives_the_tensor_back(tp: int) -> None:
    c = config(tp)
    for name, tensor in tensors(c).items():
        parts = [shard_tensor(name, tensor, c, rank) for rank in range(tp)]
        assert torch.equal(merge_tensors(name, parts, c), tensor), name


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_packed_and_fp8_tensors_come_back_too(tp: int, dtype: torch.dtype) -> None:
    c = config(tp)
    for name in ("attention.qkv.weight", "attention.dense.weight", "mlp.fc.weight"):
        whole = tensors(c)[LAYER + name]
        rows = whole.shape[0] // (2 if dtype == torch.int8 else 1)
        tensor = (numbered(rows, whole.shape[1]) % 100).to(dtype)
        parts = [shard_tensor(LAYER + name, tensor, c, rank) for rank in range(tp)]
        merged = merge_tensors(LAYER + name, parts, c)
        assert torch.equal(merged.view(torch.uint8), tensor.view(torch.uint8)), name


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 6, 8]),
    groups=st.integers(1, 4),
    kv_per_tp=st.integers(1, 3),
    vocab=st.integers(1, 70),
)
def test_any_legal_count_of_heads_and_words_comes_back(
    tp: int, groups: int, kv_per_tp: int, vocab: int
) -> None:
    kv_heads = tp * kv_per_tp
    c = config(tp, heads=groups * kv_heads, kv_heads=kv_heads, vocab=vocab)
    for name in (LAYER + "attention.qkv.weight", "lm_head.weight"):
        tensor = tensors(c)[name]
        parts = [shard_tensor(name, tensor, c, rank) for rank in range(tp)]
        assert len({part.shape for part in parts}) == 1, "ranks of a stage have equal shapes"
        assert torch.equal(merge_tensors(name, parts, c), tensor)


def mixture(tp: int, algo: str) -> ModelConfig:
    form = QuantConfig(quant_algo=algo)
    extra = {"moe": {"num_experts": 3}}
    return replace(config(tp), hidden_act="swiglu", quantization=form, extra=extra)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_up_and_gate_in_one_tensor_come_back_in_every_form(tp: int) -> None:
    c = replace(config(tp), hidden_act="swiglu")
    fc = LAYER + "mlp.fc."
    whole = {
        fc + "weight": numbered(96, 32),
        fc + "weights_scaling_factor": numbered(96, 2),
        fc + "per_channel_scale": numbered(96),
        fc + "prequant_scaling_factor": numbered(32),
        fc + "activation_scaling_factor": numbered(1),
    }
    packed = {fc + "weight": (numbered(48, 32) % 100).to(torch.int8)}
    for name, tensor in [*whole.items(), *packed.items()]:
        parts = [shard_tensor(name, tensor, c, rank) for rank in range(tp)]
        assert torch.equal(merge_tensors(name, parts, c), tensor), name


@pytest.mark.parametrize("algo", ["FP8", "W4A16_AWQ", "FP8_PER_CHANNEL_PER_TOKEN"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_experts_are_cut_inside_each_and_come_back(tp: int, algo: str) -> None:
    c = mixture(tp, algo)
    scales = {
        "FP8": {
            "mlp.fc.weights_scaling_factor": ((3, 1), (3, 1)),
            "mlp.fc.activation_scaling_factor": ((1,), (1,)),
            "mlp.proj.weights_scaling_factor": ((3, 1), (3, 1)),
        },
        "W4A16_AWQ": {
            "mlp.fc.weights_scaling_factor": ((3, 96, 2), (3, 96 // tp, 2)),
            "mlp.proj.weights_scaling_factor": ((3, 32, 8), (3, 32, 8 // tp)),
        },
        "FP8_PER_CHANNEL_PER_TOKEN": {
            "mlp.fc.per_channel_scale": ((3, 96), (3, 96 // tp)),
            "mlp.proj.per_channel_scale": ((3, 32), (3, 32)),
        },
    }[algo]
    shapes = {
        "mlp.router.weight": ((3, 32), (3, 32)),
        "mlp.fc.weight": ((3, 96, 32), (3, 96 // tp, 32)),
        "mlp.fc.bias": ((3, 96), (3, 96 // tp)),
        "mlp.proj.weight": ((3, 32, 48), (3, 32, 48 // tp)),
        **scales,
    }
    for name, (whole, of_rank) in shapes.items():
        tensor = numbered(*whole)
        parts = [shard_tensor(LAYER + name, tensor, c, rank) for rank in range(tp)]
        assert {tuple(part.shape) for part in parts} == {of_rank}, name
        assert torch.equal(merge_tensors(LAYER + name, parts, c), tensor), name


def test_a_rank_holds_its_rows_of_up_and_of_gate() -> None:
    rows = torch.arange(8).view(8, 1)
    part = shard_tensor(LAYER + "mlp.fc.weight", rows, replace(config(2), hidden_act="swiglu"), 1)
    assert part.flatten().tolist() == [2, 3, 6, 7]


def test_a_rank_holds_its_heads_of_q_k_and_v() -> None:
    c = config(2, heads=4, kv_heads=2)  # head_size 4: q rows 0-15, k 16-23, v 24-31
    rows = torch.arange(c.qkv_size)
    part = shard_tensor(LAYER + "attention.qkv.bias", rows, c, 1)
    assert part.tolist() == [*range(8, 16), *range(20, 24), *range(28, 32)]


def test_a_kv_head_is_held_by_several_ranks_when_tp_exceeds_them() -> None:
    c = config(4, heads=4, kv_heads=2)
    rows = torch.arange(c.qkv_size)
    held = [
        shard_tensor(LAYER + "attention.qkv.bias", rows, c, rank)[4:8].tolist() for rank in range(4)
    ]
    assert held == [[16, 17, 18, 19]] * 2 + [[20, 21, 22, 23]] * 2


def test_a_row_bias_is_on_the_first_rank_only() -> None:
    c = config(2)
    bias = torch.ones(32)
    parts = [shard_tensor(LAYER + "mlp.proj.bias", bias, c, rank) for rank in range(2)]
    assert torch.equal(sum(parts, torch.zeros(32)), bias), "the all-reduce adds it once"
    assert not parts[1].any()


def test_the_padded_vocabulary_rows_are_zero() -> None:
    c = config(4, vocab=10)
    parts = [shard_tensor("lm_head.weight", torch.ones(10, 2), c, rank) for rank in range(4)]
    assert [int(part.sum()) for part in parts] == [6, 6, 6, 2]


@pytest.mark.parametrize(
    ("name", "ndim", "cut"),
    [
        (LAYER + "mlp.proj.weights_scaling_factor", 2, Cut.COLUMNS),
        (LAYER + "mlp.proj.weights_scaling_factor", 1, Cut.COPY),
        (LAYER + "mlp.proj.per_channel_scale", 1, Cut.COPY),
        (LAYER + "mlp.fc.per_channel_scale", 1, Cut.ROWS),
        (LAYER + "mlp.fc.prequant_scaling_factor", 1, Cut.COPY),
        (LAYER + "mlp.proj.prequant_scaling_factor", 1, Cut.ROWS),
        (LAYER + "attention.dense.bias", 1, Cut.FIRST_RANK),
        (LAYER + "post_layernorm.weight", 1, Cut.COPY),
    ],
)
def test_cuts_are_the_contracts(name: str, ndim: int, cut: Cut) -> None:
    assert tensor_cut(name, ndim) is cut


def test_copies_that_differ_are_refused() -> None:
    name = LAYER + "mlp.fc.weights_scaling_factor"
    with pytest.raises(EngineError, match="differs between tp_rank 0 and 1"):
        merge_tensors(name, [torch.ones(1), torch.zeros(1)], config(2))


def test_a_tensor_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(EngineError, match="47 rows cannot be cut over tp=2"):
        shard_tensor(LAYER + "mlp.fc.weight", torch.ones(47, 4), config(2), 0)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])  # swiglu: up and gate in one
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_the_parts_of_pieces_are_the_part_of_the_whole(
    tp: int, activation: str, data: st.DataObject
) -> None:
    c = replace(config(tp), hidden_act=activation)
    for name, whole in tensors(c).items():
        if whole.ndim != 2:
            continue
        cuts = data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=5))
        bounds = [0, *sorted(cuts), len(whole)]
        for rank in range(tp):
            parts = [
                shard_piece(name, whole[a:b], a, whole.shape, c, rank)
                for a, b in zip(bounds, bounds[1:], strict=False)
            ]
            assert torch.equal(torch.cat(parts), shard_tensor(name, whole, c, rank)), (name, rank)

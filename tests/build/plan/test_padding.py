"""What a model is padded to, and what that does to a tensor: numbers at the least cost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from enginehouse.build.families.output_table import linear_shapes
from enginehouse.build.forms.padding import NO_PADDING, NOTHING, Order, padding_of
from enginehouse.build.plan.cuts import (
    Multiples,
    cut_model,
    least_heads,
    multiples,
    with_numbers,
)
from enginehouse.build.plan.footprint import padding_price
from enginehouse.runtime.checkpoint.packing import dequantize_int4, pack_int4
from enginehouse.runtime.config import Mapping, ModelConfig
from enginehouse.runtime.errors import PlanError


def model(tp: int = 1, **numbers: Any) -> ModelConfig:
    """hidden_size, heads, KV heads and so on; SmolLM2-135M's where they are not given."""
    sizes = dict(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_size=64,
        intermediate_size=1536,
        vocab_size=49152,
        num_hidden_layers=30,
    )
    return ModelConfig(
        architecture=numbers.pop("architecture", "LlamaForCausalLM"),
        dtype="bfloat16",
        norm_epsilon=1e-5,
        max_position_embeddings=2048,
        **{**sizes, **numbers},
    ).with_mapping(Mapping(tp, 1))


QWEN_7B = dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, head_size=128)
QWEN_HALF_B = dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
PHI3_MEDIUM = dict(hidden_size=5120, num_attention_heads=40, num_key_value_heads=10, head_size=128)


@pytest.mark.parametrize(
    ("numbers", "tp", "quant", "wanted"),
    [
        ({}, 1, "none", (9, 3, 1536)),
        ({}, 3, "int4", (9, 3, 1536)),
        ({}, 4, "none", (12, 4, 1536)),
        ({}, 4, "int4", (12, 4, 1536)),
        ({}, 2, "none", (12, 4, 1536)),
        ({}, 5, "none", (15, 5, 1540)),
        ({}, 5, "fp8", (15, 5, 1600)),  # FP8 is multiplied in sixteens
        ({}, 6, "none", (12, 3, 1536)),  # each KV head on two ranks
        ({}, 8, "none", (16, 4, 1536)),
        (dict(QWEN_7B, intermediate_size=18944), 8, "none", (32, 4, 18944)),
        (dict(QWEN_7B, intermediate_size=18944), 4, "int4", (28, 4, 18944)),
        (dict(QWEN_HALF_B, intermediate_size=4864), 4, "none", (16, 2, 4864)),
        (dict(PHI3_MEDIUM, intermediate_size=17920), 4, "none", (48, 12, 17920)),
    ],
)
def test_known_models_are_padded_to_these_numbers(
    numbers: dict[str, Any], tp: int, quant: str, wanted: tuple[int, ...]
) -> None:
    config = cut_model(model(tp, **numbers), quant).config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    assert (*heads, config.intermediate_size) == wanted


def cheapest(config: ModelConfig, rule: Multiples) -> tuple[int, int] | None:
    """Weights and KV heads of the cheapest cut, found by trying all of them."""
    tp, found = config.mapping.tp_size, []
    group = config.num_attention_heads // config.num_key_value_heads
    for kv_heads in range(config.num_key_value_heads, config.num_key_value_heads + 60):
        if kv_heads % tp and tp % kv_heads:
            continue
        for each in range(group, group + 150):
            shapes = linear_shapes(with_numbers(config, kv_heads * each, kv_heads, 1536), 0)
            outputs = shapes["attention.qkv"].out_features
            inputs = shapes["attention.dense"].in_features
            if kv_heads * each % tp == inputs % rule.cut[1] == outputs % rule.cut[0] == 0:
                stored = max(tp, kv_heads)
                found.append((2 * kv_heads * each + 2 * stored, stored))
                break
    return min(found, default=None)


def test_no_numbers_are_cheaper() -> None:
    """Weights first, then the KV cache; a copy of a head on another rank counts as one."""
    chosen = random.Random(1)
    for _ in range(150):
        kv_heads, group = chosen.randint(1, 12), chosen.randint(1, 9)
        head, tp = chosen.choice([32, 48, 64, 80, 96, 128]), chosen.randint(1, 9)
        quant, size = chosen.choice([("none", None), ("int4", 64), ("int4", 128), ("int8", None)])
        config = model(
            tp,
            num_attention_heads=kv_heads * group,
            num_key_value_heads=kv_heads,
            head_size=head,
        )
        rule = multiples(quant, tp, size)
        heads, kv = least_heads(config, rule)
        stored = max(tp, kv)
        assert (2 * heads + 2 * stored, stored) == cheapest(config, rule), (config, rule)
        assert heads % kv == 0 and heads // kv >= group and kv >= kv_heads


def test_a_model_that_fits_is_left_as_it_is() -> None:
    for tp in (1, 3):
        config = model(tp)
        assert cut_model(config, "none").config == config
        assert padding_of(config, config) == NO_PADDING
        assert padding_price(config, config) == ""
    tensor = torch.ones(3, 4)
    assert NO_PADDING.pad("transformer.layers.0.mlp.proj.weight", tensor) is tensor


def test_the_price_counts_every_weight() -> None:
    before = model(4)
    after = cut_model(before, "none").config
    layer = 2 * 9 * 64 * 576 + 2 * 3 * 64 * 576 + 3 * 576 * 1536 + 2 * 576
    whole = 30 * layer + 576 + 2 * 49152 * 576
    added = 30 * (2 * 3 + 2 * 1) * 64 * 576
    share = f"+{100 * added / whole:.1f} % weights"
    wanted = f"padded for TP 4: 9 -> 12 heads, 3 -> 4 KV heads, {share}"
    assert padding_price(before, after) == wanted


def test_columns_of_experts_are_padded_and_the_dense_number_stays() -> None:
    extra = {"moe": {"num_experts": 4, "top_k": 2}, "moe_intermediate_size": 42}
    before = model(4, extra=extra, num_attention_heads=12, num_key_value_heads=4)
    after = cut_model(before, "none").config
    assert (after.moe_intermediate_size, after.intermediate_size) == (44, 1536)
    assert "42 -> 44 columns of each expert, +" in padding_price(before, after)
    assert "heads" not in padding_price(before, after)


def test_packed_nibbles_scales_and_zeros_are_padded_as_their_weights() -> None:
    """INT4 with zero points that was packed before: what it means is the padded weight."""
    torch.manual_seed(0)
    before = model(8, num_attention_heads=6, hidden_size=128)
    padding = padding_of(before, with_numbers(before, 16, 4, 1536))
    assert padding.keeps_groups(64) and not padding.keeps_groups(256)
    for name, shape in {"qkv": (768, 128), "dense": (128, 384)}.items():
        q = torch.randint(-8, 8, shape, dtype=torch.int8)
        scale = torch.rand(shape[0], shape[1] // 64) + 0.5
        tensors = {"weight": pack_int4(q), "weights_scaling_factor": scale}
        tensors["zero"] = torch.randn(scale.T.shape)
        whole = dequantize_int4(*tensors.values())
        filled = {key: padding.pad(f"attention.{name}.{key}", t) for key, t in tensors.items()}
        wanted = padding.pad(f"attention.{name}.weight", whole)
        assert torch.equal(dequantize_int4(*filled.values()), wanted)
        assert (filled["weights_scaling_factor"] > 0).all(), "a group of zeros has a legal scale"
        assert torch.equal(padding.unpad(f"attention.{name}.weight", wanted), whole)


def test_vectors_are_padded_with_what_changes_nothing() -> None:
    before = model(8, num_attention_heads=6, num_key_value_heads=3, head_size=2)
    padding = padding_of(before, with_numbers(before, 16, 4, 1538))
    ones, twos = torch.ones(24), torch.full((12,), 2.0)
    bias = padding.pad("attention.qkv.bias", ones)
    assert bias[:8].tolist() == [1, 1, 1, 1, 0, 0, 0, 0] and len(bias) == 48 and bias.sum() == 24
    assert (padding.pad("attention.qkv.per_channel_scale", ones) == 1).all()
    factors = padding.pad("attention.dense.prequant_scaling_factor", twos)
    assert factors[:8].tolist() == [2, 2, 2, 2, 1, 1, 1, 1] and factors[-8:].tolist() == [1] * 8
    for name in ("attention.dense.bias", "mlp.proj.bias", "mlp.proj.activation_scaling_factor"):
        assert padding.pad(name, twos) is twos
    assert len(padding.pad("mlp.gate.bias", torch.ones(1536))) == 1538


def test_a_head_that_is_added_can_ask_what_the_last_of_its_group_asks() -> None:
    """Where a scale is taken from a token's largest number."""
    before = model(8, num_attention_heads=6, head_size=2, hidden_size=3)
    after = with_numbers(before, 16, 4, 1536)
    weight = torch.arange(36.0).view(12, 3).repeat(2, 1)[:24] + 1
    q = padding_of(before, after, repeat_queries=True).pad("attention.qkv.weight", weight)[:32]
    heads = q.view(16, 2, 3)
    assert torch.equal(heads[2], heads[1]) and torch.equal(heads[3], heads[1])
    assert not heads[12:].any(), "a group of zeros gives zeros"


@pytest.mark.parametrize(
    ("now", "unit", "aligned"),
    [
        ([0, 1, 2, 3, NOTHING, NOTHING], 2, True),
        ([0, 1, NOTHING, NOTHING, 2, 3], 2, True),
        ([0, 1, NOTHING, 2, 3, NOTHING], 2, False),
        ([1, 2, 0, 3], 2, False),
        ([0, 1, 2, 3, NOTHING], 2, False),
        ([0, 1, 2, 3, NOTHING], 1, True),
    ],
)
def test_an_order_keeps_runs_whole_or_says_that_it_does_not(
    now: list[int], unit: int, aligned: bool
) -> None:
    order = Order(4, torch.tensor(now))
    assert order.is_aligned(unit) == aligned
    assert order.now[order.back()].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("numbers", "tp", "quant", "trtllm", "wanted"),
    [
        ({}, 4, "int4", True, "hidden_size=576.* no multiple of 256.* legal tp for int4: 1, 3, 9"),
        (dict(hidden_size=584), 1, "int4", False, "no multiple of 64.* legal tp for int4: none"),
        (dict(hidden_size=600), 1, "int8", False, "int8: hidden_size=600.* no multiple of 16"),
        ({}, 2000, "none", False, "tp=2000 is more ranks than the MLP has columns"),
        (
            dict(architecture="Phi3ForCausalLM"),
            4,
            "none",
            True,
            "num_attention_heads=9 cannot be cut over tp=4.* legal tp for none: 1, 3, 9",
        ),
        (
            dict(extra={"kv_lora_rank": 64}),
            4,
            "none",
            False,
            "num_attention_heads=9 cannot be cut over tp=4, and they share latents, .*: 1, 3, 9",
        ),
    ],
)
def test_what_no_padding_helps_is_one_sentence(
    numbers: dict[str, Any], tp: int, quant: str, trtllm: bool, wanted: str
) -> None:
    with pytest.raises(PlanError, match=wanted):
        cut_model(model(tp, **numbers), quant, for_trtllm=trtllm)

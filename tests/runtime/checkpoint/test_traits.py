"""What TensorRT engines do not do of a decoder is told by its first word."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.runtime.checkpoint.traits import beyond_tensorrt
from makers.tiny_network import tiny_config

MOE = dict(num_experts=8, top_k=2, normalization_mode=1, sparse_mixer_epsilon=0.01, tp_mode=0)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"moe": MOE}, None),
        ({"moe": {**MOE, "scoring": "sigmoid", "shared_expert_intermediate_size": 64}}, None),
        ({"moe": {**MOE, "scoring": "sigmoid of inputs"}}, None),
        ({"moe": MOE, "swiglu_limit": 7.0}, None),
        ({"layer_intermediate_sizes": [0]}, None),
        ({"kv_lora_rank": 64, "qk_rope_head_dim": 32}, None),
        ({"attention_gate": True}, "gated attention"),
    ],
)
def test_a_decoder_of_another_kind_is_not_taken_for_a_known_one(
    extra: dict[str, Any], wanted: str | None
) -> None:
    assert beyond_tensorrt(tiny_config("none", hidden_act="swiglu", extra=extra)) == wanted


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"layer_head_sizes": [16], "layer_kv_heads": [2]}, "heads of several sizes"),
        ({"kv_source_layers": [0]}, "layers that read the keys of others"),
        ({"per_layer_input_size": 8}, "inputs of each layer"),
        ({"layer_multipliers": True}, "a multiplier of each layer"),
        ({"v_layernorm": True}, "norms of values"),
        ({"altup_num_inputs": 4}, "several residual streams"),
        ({"laurel_rank": 64}, "a learned residual"),
        ({"activation_sparsity_pattern": [0.95]}, "sparse MLPs"),
        ({"moe": MOE, "expert_layernorms": True}, "experts with norms of their own"),
    ],
)
def test_what_tensorrt_does_not_do_of_layers_is_said_by_name(
    extra: dict[str, Any], wanted: str
) -> None:
    config = tiny_config("none", hidden_act="swiglu", extra=extra)
    assert beyond_tensorrt(config) == wanted

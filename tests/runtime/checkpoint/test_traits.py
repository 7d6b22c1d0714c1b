"""What TensorRT engines do not do of a mixture is told by its first word."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.runtime.checkpoint.traits import beyond_tensorrt
from makers.tiny_network import tiny_config

MOE = dict(num_experts=8, top_k=2, normalization_mode=1, sparse_mixer_epsilon=0.01, tp_mode=0)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, None),
        ({"shared_expert_intermediate_size": 0, "device_limited_n_group": 0}, None),
        ({"shared_expert_intermediate_size": 64}, "an expert that every token sees"),
        ({"device_limited_n_group": 4}, "groups of experts"),
        ({"scoring": "sigmoid"}, "experts that sigmoids choose"),
        ({"device_limited_routed_scaling_factor": 2.5}, "shares of experts that are scaled"),
    ],
)
def test_a_mixture_of_another_kind_is_not_taken_for_mixtrals(
    changes: dict[str, Any], wanted: str | None
) -> None:
    config = tiny_config("none", hidden_act="swiglu", extra={"moe": MOE | changes})
    assert beyond_tensorrt(config) == wanted

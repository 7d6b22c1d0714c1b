"""The keys of a mixture of experts, as TensorRT-LLM's MoeConfig.

Source: TensorRT-LLM 1.2.1's `MoeConfig`; transformers' configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.build.families.config_values import integer
from enginehouse.runtime.errors import CheckpointError


def moe_config(num_experts: int, top_k: int, renormalize: bool) -> dict[str, Any]:
    """Every field written out."""
    return {
        "num_experts": num_experts,
        "shared_expert_intermediate_size": 0,
        "top_k": top_k,
        "normalization_mode": int(renormalize),
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    }


def read_experts(hf: Mapping[str, Any], renormalize: bool) -> dict[str, Any]:
    """renormalize: whether the shares of the chosen ones are scaled to sum to 1."""
    key = "num_local_experts" if "num_local_experts" in hf else "num_experts"
    count, top_k = integer(hf, key), integer(hf, "num_experts_per_tok")
    if not 1 < count or top_k > count:
        raise CheckpointError(
            f"config.json has {key}={count}, num_experts_per_tok={top_k}; wanted two experts or "
            "more, and no more chosen than there are"
        )
    return moe_config(count, top_k, renormalize)

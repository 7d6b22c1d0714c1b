"""The config.json keys of families with linear attention by the gated delta rule: Qwen3-Next, and
Qwen3.5 dense and with experts.

Source: transformers' Qwen3NextConfig, Qwen3_5TextConfig and Qwen3_5MoeTextConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.hf_keys.config_values import REMEDY, SILU, SWIGLU, integer, refuse
from enginehouse.build.hf_keys.mixture_keys import qwen2_moe
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]

# What the classes take for what config.json leaves out.
_SIZES: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def _delta_keys(hf: Hf) -> dict[str, Any]:
    """Sizes of linear attention and the layers that have it; the others' attention has gates."""
    for name, usual in (("attention_bias", False), ("attn_output_gate", True)):
        refuse(hf, name, (usual,))
    count, every = integer(hf, "num_hidden_layers"), integer(hf, "full_attention_interval", 4)
    kinds = ("linear_attention", "full_attention")
    types = hf.get("layer_types") or [kinds[(i + 1) % every == 0] for i in range(count)]
    if not isinstance(types, list) or len(types) != count or any(t not in kinds for t in types):
        raise CheckpointError(
            f"config.json has layer_types={types!r}; wanted {count} times {' or '.join(kinds)}"
        )
    key_heads, value_heads = (integer(hf, f"linear_num_{word}_heads") for word in ("key", "value"))
    if value_heads % key_heads:
        raise CheckpointError(
            f"config.json has linear_num_value_heads={value_heads}, which linear_num_key_heads="
            f"{key_heads} does not divide; {REMEDY}"
        )
    linear = {
        "layers": [i for i, kind in enumerate(types) if kind == kinds[0]],
        "num_key_heads": key_heads,
        "num_value_heads": value_heads,
        "key_head_dim": integer(hf, "linear_key_head_dim"),
        "value_head_dim": integer(hf, "linear_value_head_dim"),
        "conv_kernel": integer(hf, "linear_conv_kernel_dim"),
    }
    found = {"linear_attention": linear} if linear["layers"] else {}
    return {**found, "attention_gate": True, "qk_layernorm": True}


def _with_experts(hf: Hf) -> dict[str, Any]:
    return {**qwen2_moe(hf), **_delta_keys(hf)}


_EXPERTS: dict[str, Any] = {
    **_SIZES,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {**_EXPERTS, "num_experts": 512, "num_experts_per_tok": 10},
    "Qwen3_5ForCausalLM": {**_SIZES, "num_key_value_heads": 4},
    "Qwen3_5MoeForCausalLM": {
        **_EXPERTS,
        "intermediate_size": 512,  # of no layer: all have experts
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
}
EXTRA: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "Qwen3NextForCausalLM": _with_experts,
    "Qwen3_5ForCausalLM": _delta_keys,
    "Qwen3_5MoeForCausalLM": _with_experts,
}
ACTIVATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "Qwen3NextForCausalLM": SWIGLU,
    "Qwen3_5ForCausalLM": SILU,
    "Qwen3_5MoeForCausalLM": SWIGLU,
}

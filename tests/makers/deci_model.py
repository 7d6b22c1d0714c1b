"""Nemotron NAS models, of transformers' own Llama parts: its layers lack what block_configs leave
out, and have MLPs of their own sizes. transformers itself has no class for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

# As nvidia/Llama-3_3-Nemotron-Super-49B-v1's config.json has them: 256 rows, 512, none.
BLOCKS: list[dict[str, Any]] = [
    {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 3.0}},
    {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 4.5}},
    {
        "attention": {"n_heads_in_group": 2, "replace_with_linear": False},
        "ffn": {"ffn_mult": None, "no_op": True},
    },
    {"attention": {"no_op": True}, "ffn": {"no_op": True}},
]
SIZES = (256, 512)  # of the first two layers' MLPs, 2 / 3 * ffn_mult * 128, up to a multiple of 256


class Nothing(nn.Module):
    """An attention or MLP that adds nothing."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.is_attention else zeros


def deci_model(config: LlamaConfig) -> LlamaForCausalLM:
    """config: with four layers. Weights are as transformers begins them."""
    model = LlamaForCausalLM(config)
    for index, (layer, block) in enumerate(zip(model.model.layers, BLOCKS, strict=True)):
        if block["attention"].get("no_op"):
            layer.self_attn, layer.input_layernorm = Nothing(True), nn.Identity()
        if block["ffn"].get("no_op"):
            layer.mlp, layer.post_attention_layernorm = Nothing(False), nn.Identity()
        else:
            own = LlamaConfig(**{**config.to_dict(), "intermediate_size": SIZES[index]})
            layer.mlp = LlamaMLP(own)
    return model


def deci_keys() -> dict[str, Any]:
    """What its config.json has otherwise than a Llama's."""
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "block_configs": BLOCKS,
        "intermediate_size": None,
        "num_key_value_heads": None,
    }

"""A decoder of one layer and the limits of its plan: the smallest that a compiler takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.tensorrt.compile import PlanLimits
from enginehouse.runtime.config import Mapping, ModelConfig

TINY = PlanLimits(context=256, batch=8, chunk=64, prefill_batch=1, max_positions=256)


def tiny_config(quant: str, dtype: str = "bfloat16", tp: int = 1, **changes: Any) -> ModelConfig:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        dtype=dtype,
        vocab_size=510,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_size=32,
        intermediate_size=512,
        norm_epsilon=1e-5,
        max_position_embeddings=256,
        quantization=replace(QUANT_CONFIGS[quant], group_size=64),
    )
    return replace(config, **changes).with_mapping(Mapping(tp))

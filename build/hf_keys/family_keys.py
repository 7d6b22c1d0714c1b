"""The config.json keys that only one family has, in both vocabularies.

Tables of defaults and activations, and one function a family for what it adds. Rope is
rope_config.py's. What TensorRT-LLM has no word for is a word of runtime/checkpoint/traits.py.
Source: TensorRT-LLM 1.2.1's `LLaMAConfig`, `QWenConfig`, `GemmaConfig`, `Phi3Config`;
transformers' configs for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.hf_keys import own_keys
from enginehouse.build.hf_keys.attention_keys import sliding_layers
from enginehouse.build.hf_keys.config_values import (
    GELU,
    SILU,
    SWIGLU,
    TANH_WORDS,
    boolean,
    integer,
    number,
    refuse,
)
from enginehouse.build.hf_keys.mixture_keys import dense_layers, moe_config, read_experts
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]

# What Hugging Face's config class takes for a key that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "MixtralForCausalLM": {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    # the class has a bias always, and no key for it
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "attention_bias": True},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    **own_keys.DEFAULTS,
    "GemmaForCausalLM": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
}
# Hugging Face's words for the activation (the first is the usual one), and TensorRT-LLM's.
# swiglu: mlp.fc holds up and gate together.
ACTIVATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "LlamaForCausalLM": SILU,
    "MistralForCausalLM": SILU,
    "MixtralForCausalLM": SWIGLU,
    "Qwen2ForCausalLM": SILU,
    "Qwen3ForCausalLM": SILU,
    "Qwen3MoeForCausalLM": SWIGLU,
    "Phi3ForCausalLM": SWIGLU,
    **own_keys.ACTIVATIONS,
    # Gemma 1 was released with "gelu" and trained with the tanh form
    "GemmaForCausalLM": ((*TANH_WORDS, "gelu"), "gelu_pytorch_tanh"),
    "Gemma2ForCausalLM": GELU,
    "Gemma3ForCausalLM": GELU,
}


def family_extra(hf: Hf, name: str) -> dict[str, Any]:
    """The keys of config.json that only this family has.

    Raises CheckpointError for what the family's TensorRT-LLM class cannot express.
    """
    return _EXTRA[name](hf)


def _llama(hf: Hf) -> dict[str, Any]:
    return {
        "qk_layernorm": False,
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
    }


def _mixtral(hf: Hf) -> dict[str, Any]:
    return {**_llama(hf), "moe": read_experts(hf, renormalize=True)}


def _qwen(qwen_type: str, hf: Hf) -> dict[str, Any]:
    return {
        "qwen_type": qwen_type,
        "seq_length": integer(hf, "seq_length", 8192),  # TensorRT-LLM wants the key
        "qk_layernorm": qwen_type != "qwen2",
        "moe": moe_config(0, 0, renormalize=False),
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
        "use_logn_attn": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "num_labels": 1,
        "disable_weight_only_quant_plugin": False,
    }


def _qwen2(hf: Hf) -> dict[str, Any]:
    return _qwen("qwen2", hf)


def _qwen3(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    return _qwen("qwen3", hf)


def _qwen3_moe(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    return {
        **_qwen("qwen3_moe", hf),
        **dense_layers(hf),
        "moe": read_experts(hf, renormalize=boolean(hf, "norm_topk_prob")),
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
    }


def _phi3(hf: Hf) -> dict[str, Any]:
    return {"qk_layernorm": False}


def _gemma(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    refuse(hf, "use_bidirectional_attention", (False,))
    return {"qk_layernorm": False, "inter_layernorms": False}


def _cap(hf: Hf, key: str) -> float | None:
    return number(hf, key) if key in hf else None


def _gemma2(hf: Hf) -> dict[str, Any]:
    return {
        **_gemma(hf),
        "inter_layernorms": True,
        "query_pre_attn_scalar": number(hf, "query_pre_attn_scalar", 256),
        "attn_logit_softcapping": _cap(hf, "attn_logit_softcapping"),
        "final_logit_softcapping": _cap(hf, "final_logit_softcapping"),
    }


def _gemma3(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attn_logit_softcapping", ())
    return {
        **_gemma(hf),
        "qk_layernorm": True,
        "inter_layernorms": True,
        "query_pre_attn_scalar": number(hf, "query_pre_attn_scalar", 256),
        "final_logit_softcapping": _cap(hf, "final_logit_softcapping"),
        "sliding_window": integer(hf, "sliding_window", integer(hf, "max_position_embeddings")),
        "_sliding_window_pattern": _pattern(hf),
    }


_EXTRA: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Phi3ForCausalLM": _phi3,
    **own_keys.EXTRA,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}


def _pattern(hf: Hf) -> int:
    """Gemma 3's n of "all layers but every n-th slide", which is all that its class knows."""
    sliding = sliding_layers(hf, "Gemma3ForCausalLM")
    pattern = sliding.index(False) + 1 if False in sliding else len(sliding) + 1
    if any(slides != ((i + 1) % pattern != 0) for i, slides in enumerate(sliding)):
        raise CheckpointError(
            "config.json has layer_types in no regular pattern; TensorRT-LLM's Gemma 3 knows only "
            "a full_attention layer after every so many sliding ones"
        )
    return pattern

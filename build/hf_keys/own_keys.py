"""The config.json keys of families that TensorRT-LLM 1.2.1 has no class for.

What they come to are words of our own, which runtime/checkpoint/traits.py reads. Tables of
defaults, activations and names of keys, and one function a family. Source: transformers' configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.hf_keys import delta_keys, mixture_keys
from enginehouse.build.hf_keys.attention_keys import (
    LATENT,
    latent_keys,
    latent_sizes,
    sliding_layers,
)
from enginehouse.build.hf_keys.config_values import (
    EXACT_GELU,
    GEGLU,
    GELU,
    RELU2,
    SILU,
    SWIGLU,
    integer,
    number,
    refuse,
)
from enginehouse.build.hf_keys.layer_keys import (
    GEMMA3N,
    GEMMA4,
    deci_gaps,
    deci_sizes,
    gemma3n_keys,
    gemma3n_sizes,
    gemma4_keys,
    gemma4_sizes,
)
from enginehouse.build.hf_keys.mixture_keys import granite_multipliers, llama4_sizes
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]

_GLM: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
# What Hugging Face's config class takes for a key that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "NemotronForCausalLM": {"norm_eps": 1e-5},
    "ArceeForCausalLM": {},
    "Starcoder2ForCausalLM": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_bias": True,
        "norm_epsilon": 1e-5,
    },
    "StableLmForCausalLM": {"num_key_value_heads": 32, "layer_norm_eps": 1e-5},
    "CohereForCausalLM": {
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
    },
    "Cohere2ForCausalLM": {
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "GlmForCausalLM": _GLM,
    "Glm4ForCausalLM": _GLM,
    "Ernie4_5ForCausalLM": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
    },
    "HeliumForCausalLM": {"num_key_value_heads": 20, "head_dim": 128, "rope_theta": 1e5},
    "GraniteForCausalLM": {},
    "SmolLM3ForCausalLM": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
    "SeedOssForCausalLM": {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    "Olmo2ForCausalLM": {},
    "OlmoForCausalLM": {"rms_norm_eps": 1e-5},
    "InternLM3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 128},
    "CwmForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": 8192,
        "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "MinistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Ministral3ForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "HunYuanDenseV1ForCausalLM": {},
    "PhiForCausalLM": {"attention_bias": True, "mlp_bias": True, "layer_norm_eps": 1e-5},
    "DeciLMForCausalLM": {},
    "YoutuForCausalLM": {**LATENT, "tie_word_embeddings": True},
    "GraniteMoeHybridForCausalLM": {},
    "Olmo3ForCausalLM": {"sliding_window": 4096},
    "Exaone4ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
    "GPTNeoXForCausalLM": {"attention_bias": True, "mlp_bias": True, "layer_norm_eps": 1e-5},
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma3nForCausalLM": GEMMA3N,
    **mixture_keys.DEFAULTS,
    **delta_keys.DEFAULTS,
}
ACTIVATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "NemotronForCausalLM": RELU2,
    "ArceeForCausalLM": RELU2,
    "Starcoder2ForCausalLM": GELU,
    "StableLmForCausalLM": SILU,
    "CohereForCausalLM": SILU,
    "Cohere2ForCausalLM": SILU,
    "GlmForCausalLM": SWIGLU,
    "Glm4ForCausalLM": SWIGLU,
    "Ernie4_5ForCausalLM": SILU,
    "HeliumForCausalLM": SILU,
    "GraniteForCausalLM": SILU,
    "SmolLM3ForCausalLM": SILU,
    "SeedOssForCausalLM": SILU,
    "Olmo2ForCausalLM": SILU,
    "OlmoForCausalLM": SILU,
    "InternLM3ForCausalLM": SILU,
    "CwmForCausalLM": SILU,
    "MinistralForCausalLM": SILU,
    "Ministral3ForCausalLM": SILU,
    "HunYuanDenseV1ForCausalLM": SILU,
    "PhiForCausalLM": GELU,
    "DeciLMForCausalLM": SILU,
    "YoutuForCausalLM": SILU,
    "GraniteMoeHybridForCausalLM": SWIGLU,
    "Olmo3ForCausalLM": SILU,
    "Exaone4ForCausalLM": SILU,
    "GPTNeoXForCausalLM": EXACT_GELU,
    "Gemma4ForCausalLM": GEGLU,
    "Gemma3nForCausalLM": GELU,
    **mixture_keys.ACTIVATIONS,
    **delta_keys.ACTIVATIONS,
}
# Of families whose models differ, those beside the usual one.
OTHER_ACTIVATIONS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "GPTNeoXForCausalLM": (GELU,)
}
# The keys of the biases of attention and of MLP, where they have other names.
BIAS_KEYS = {
    "Ernie4_5ForCausalLM": ("use_bias", "use_bias"),
    "Starcoder2ForCausalLM": ("use_bias", "use_bias"),
    "StableLmForCausalLM": ("use_qkv_bias", "mlp_bias"),
}
EPSILON_KEYS = {
    "NemotronForCausalLM": "norm_eps",
    "Starcoder2ForCausalLM": "norm_epsilon",
    "StableLmForCausalLM": "layer_norm_eps",
    "CohereForCausalLM": "layer_norm_eps",
    "Cohere2ForCausalLM": "layer_norm_eps",
    "PhiForCausalLM": "layer_norm_eps",
    "GPTNeoXForCausalLM": "layer_norm_eps",
}


def _arcee(hf: Hf) -> dict[str, Any]:
    return {"gated_mlp": False}


def _nemotron(hf: Hf) -> dict[str, Any]:
    return {"gated_mlp": False, "layer_norm": True}


def _cohere(hf: Hf) -> dict[str, Any]:
    for name in ("attention_bias", "use_qk_norm"):
        refuse(hf, name, (False,))
    return {
        "layer_norm": True,
        "parallel_sublayers": True,
        "rope_interleaved": True,
        "logits_scaling": 1.0 / number(hf, "logit_scale", 0.0625),
    }


def _cohere2(hf: Hf) -> dict[str, Any]:
    """Layers that see everything turn nothing."""
    sliding = sliding_layers(hf, "Cohere2ForCausalLM")
    return {**_cohere(hf), "no_rope_layers": [i for i, slides in enumerate(sliding) if not slides]}


def _stablelm(hf: Hf) -> dict[str, Any]:
    for name in ("qk_layernorm", "use_parallel_residual"):
        refuse(hf, name, (False,))
    return {"layer_norm": True}


def _glm(hf: Hf) -> dict[str, Any]:
    return {"rope_interleaved": True}


def _glm4(hf: Hf) -> dict[str, Any]:
    return {**_glm(hf), "inter_layernorms": True}


def _helium(hf: Hf) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        refuse(hf, name, (False,))
    return _glm(hf)


def _smollm3(hf: Hf) -> dict[str, Any]:
    refuse(hf, "use_sliding_window", (False,))
    count = integer(hf, "num_hidden_layers")
    interval = integer(hf, "no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if not isinstance(turned, list) or len(turned) < count or set(turned) - {0, 1}:
        raise CheckpointError(
            f"config.json has no_rope_layers={turned!r}; wanted {count} times 1, or 0 for a layer "
            "without rope"
        )
    return {"no_rope_layers": [i for i in range(count) if not turned[i]]}


def _seed_oss(hf: Hf) -> dict[str, Any]:
    for name in ("attention_out_bias", "mlp_bias"):
        refuse(hf, name, (False,))
    return {}


def _olmo2(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    over_all = {"qk_layernorm": True, "qk_layernorm_all_heads": True}
    return {**over_all, "input_layernorms": False, "inter_layernorms": True}


def _olmo3(hf: Hf) -> dict[str, Any]:
    """Rope's scaling is of the layers that see everything."""
    sliding = sliding_layers(hf, "Olmo3ForCausalLM")
    return {**_olmo2(hf), "local_rope_layers": [i for i, slides in enumerate(sliding) if slides]}


def _olmo(hf: Hf) -> dict[str, Any]:
    """LayerNorm without weights."""
    refuse(hf, "attention_bias", (False,))
    clip = {"clip_qkv": number(hf, "clip_qkv")} if "clip_qkv" in hf else {}
    return {**clip, "layer_norm": True, "norm_weights": False}


def _plain(hf: Hf) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        refuse(hf, name, (False,))
    return {}


def _internlm3(hf: Hf) -> dict[str, Any]:
    for name in ("qkv_bias", "bias"):
        refuse(hf, name, (False,))
    return {}


def _hunyuan(hf: Hf) -> dict[str, Any]:
    refuse(hf, "use_qk_norm", (True,))
    return {"qk_layernorm": True, "qk_layernorm_after_rope": True}


def _phi(hf: Hf) -> dict[str, Any]:
    refuse(hf, "qk_layernorm", (False,))
    return {**_nemotron(hf), "parallel_sublayers": True, "lm_head_bias": True}


def _granite_hybrid(hf: Hf) -> dict[str, Any]:
    """Granite 4's dense models: attention everywhere, and no expert but the shared one."""
    types = hf.get("layer_types") or hf.get("layers_block_type") or []
    for name, usual in (("attention_bias", False), ("num_local_experts", 0)):
        refuse(hf, name, (usual,))
    if set(types) - {"attention", "full_attention"} or not types:
        raise CheckpointError(
            f"config.json has layer_types={types!r}; an engine of the family knows only attention, "
            "no Mamba layers"
        )
    count, is_turned = integer(hf, "num_hidden_layers"), hf.get("position_embedding_type") == "rope"
    no_rope = {} if is_turned else {"no_rope_layers": list(range(count))}
    return {**granite_multipliers(hf), **no_rope}


def _exaone4(hf: Hf) -> dict[str, Any]:
    """Where some layers slide, the others turn nothing."""
    count, slides = integer(hf, "num_hidden_layers"), "sliding_window" in hf
    sliding = sliding_layers(hf, "Exaone4ForCausalLM") if slides else [True] * count
    return {
        "qk_layernorm": True,
        "input_layernorms": False,
        "inter_layernorms": True,
        "no_rope_layers": [i for i in range(count) if not sliding[i]],
    }


def _neox(hf: Hf) -> dict[str, Any]:
    """The MLP beside attention has a norm of its own."""
    parallel = hf.get("use_parallel_residual", True)
    refuse(hf, "use_parallel_residual", (True, False))
    beside = {"parallel_sublayers": True, "parallel_mlp_layernorm": True}
    return {**_nemotron(hf), **(beside if parallel else {})}


def _neox_sizes(hf: Hf) -> dict[str, Any]:
    """Each head has keys of its own; its rope under the words that others have."""
    words = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    rope = {usual: hf[own] for own, usual in words.items() if own in hf}
    return {**rope, "num_key_value_heads": integer(hf, "num_attention_heads")}


EXTRA: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "NemotronForCausalLM": _nemotron,
    "ArceeForCausalLM": _arcee,
    "Starcoder2ForCausalLM": _nemotron,
    "StableLmForCausalLM": _stablelm,
    "CohereForCausalLM": _cohere,
    "Cohere2ForCausalLM": _cohere2,
    "GlmForCausalLM": _glm,
    "Glm4ForCausalLM": _glm4,
    "Ernie4_5ForCausalLM": _glm,
    "HeliumForCausalLM": _helium,
    "GraniteForCausalLM": granite_multipliers,
    "GraniteMoeHybridForCausalLM": _granite_hybrid,
    "SmolLM3ForCausalLM": _smollm3,
    "SeedOssForCausalLM": _seed_oss,
    "OlmoForCausalLM": _olmo,
    "Olmo2ForCausalLM": _olmo2,
    "InternLM3ForCausalLM": _internlm3,
    "CwmForCausalLM": _plain,
    "MinistralForCausalLM": _plain,
    "Ministral3ForCausalLM": _plain,
    "HunYuanDenseV1ForCausalLM": _hunyuan,
    "PhiForCausalLM": _phi,
    "DeciLMForCausalLM": deci_gaps,
    "YoutuForCausalLM": latent_keys,
    "Olmo3ForCausalLM": _olmo3,
    "Exaone4ForCausalLM": _exaone4,
    "GPTNeoXForCausalLM": _neox,
    "Gemma4ForCausalLM": gemma4_keys,
    "Gemma3nForCausalLM": gemma3n_keys,
    **mixture_keys.EXTRA,
    **delta_keys.EXTRA,
}
# Of families that say layer by layer what others say once.
SIZES: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "DeciLMForCausalLM": deci_sizes,
    **dict.fromkeys(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"), latent_sizes
    ),
    "YoutuForCausalLM": latent_sizes,
    "Llama4ForCausalLM": llama4_sizes,
    "GPTNeoXForCausalLM": _neox_sizes,
    "Gemma4ForCausalLM": gemma4_sizes,
    "Gemma3nForCausalLM": gemma3n_sizes,
    "GraniteMoeHybridForCausalLM": lambda hf: {
        "intermediate_size": integer(hf, "shared_intermediate_size", 1024)
    },
}

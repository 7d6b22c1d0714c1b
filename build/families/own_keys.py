"""The config.json keys of families that TensorRT-LLM 1.2.1 has no class for.

What they come to are words of our own, which runtime/checkpoint/traits.py reads. Tables of
defaults, activations and names of keys, and one function a family. Source: transformers' configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.families.activation_words import GELU, RELU2, SILU, SWIGLU
from enginehouse.build.families.config_values import boolean, integer, number, refuse
from enginehouse.build.families.mixture_keys import read_experts
from enginehouse.build.families.window_keys import sliding_layers
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
    "GraniteMoeForCausalLM": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "SmolLM3ForCausalLM": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
    "SeedOssForCausalLM": {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    "OlmoeForCausalLM": {"num_experts": 64, "num_experts_per_tok": 8},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {"sliding_window": 4096},
    "Exaone4ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
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
    "GraniteMoeForCausalLM": SWIGLU,
    "SmolLM3ForCausalLM": SILU,
    "SeedOssForCausalLM": SILU,
    "OlmoeForCausalLM": SWIGLU,
    "Olmo2ForCausalLM": SILU,
    "Olmo3ForCausalLM": SILU,
    "Exaone4ForCausalLM": SILU,
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


def _granite(hf: Hf) -> dict[str, Any]:
    """Each is 1 where it is left out, the attention's too."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    return {name: number(hf, name, 1.0) for name in (*names, "logits_scaling")}


def _granite_moe(hf: Hf) -> dict[str, Any]:
    """Shares are a softmax over the chosen experts alone."""
    refuse(hf, "attention_bias", (False,))
    return {**_granite(hf), "moe": read_experts(hf, renormalize=True)}


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


def _olmoe(hf: Hf) -> dict[str, Any]:
    for name, usual in (("attention_bias", False), ("clip_qkv", None)):
        refuse(hf, name, (usual,))
    over_all = {"qk_layernorm": True, "qk_layernorm_all_heads": True}
    return {**over_all, "moe": read_experts(hf, renormalize=boolean(hf, "norm_topk_prob"))}


def _olmo2(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    over_all = {"qk_layernorm": True, "qk_layernorm_all_heads": True}
    return {**over_all, "input_layernorms": False, "inter_layernorms": True}


def _olmo3(hf: Hf) -> dict[str, Any]:
    """Rope's scaling is of the layers that see everything."""
    sliding = sliding_layers(hf, "Olmo3ForCausalLM")
    return {**_olmo2(hf), "local_rope_layers": [i for i, slides in enumerate(sliding) if slides]}


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
    "GraniteForCausalLM": _granite,
    "GraniteMoeForCausalLM": _granite_moe,
    "SmolLM3ForCausalLM": _smollm3,
    "SeedOssForCausalLM": _seed_oss,
    "OlmoeForCausalLM": _olmoe,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo3,
    "Exaone4ForCausalLM": _exaone4,
}

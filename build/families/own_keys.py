"""The config.json keys of families that TensorRT-LLM 1.2.1 has no class for.

What they come to are words of our own, which runtime/checkpoint/traits.py reads. Tables of
defaults, activations and names of keys, and one function a family. Source: transformers' configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.families import mixture_keys
from enginehouse.build.families.config_values import (
    GELU,
    RELU2,
    SILU,
    SWIGLU,
    integer,
    json_object,
    number,
    refuse,
)
from enginehouse.build.families.mixture_keys import granite_multipliers
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
    "GraniteMoeHybridForCausalLM": {},
    "Olmo3ForCausalLM": {"sliding_window": 4096},
    "Exaone4ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
    **mixture_keys.DEFAULTS,
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
    "GraniteMoeHybridForCausalLM": SWIGLU,
    "Olmo3ForCausalLM": SILU,
    "Exaone4ForCausalLM": SILU,
    **mixture_keys.ACTIVATIONS,
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


_FFN_MULTIPLE = 256


def _deci(hf: Hf) -> dict[str, Any]:
    """Source: `block_configs` of nvidia/Llama-3_3-Nemotron-Super-49B-v1 and its modeling_decilm.py.

    A layer may lack attention, or the MLP, and has an MLP of its own size.
    """
    blocks = deci_blocks(hf)
    no_attention = [i for i, (attention, _) in enumerate(blocks) if attention.get("no_op")]
    sizes = [_deci_inner(hf, ffn) for _, ffn in blocks]
    gaps = {"no_attention_layers": no_attention} if no_attention else {}
    if set(sizes) != {integer(hf, "intermediate_size")}:
        gaps["layer_intermediate_sizes"] = sizes
    return gaps


def deci_blocks(hf: Hf) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What config.json says of each layer's attention and of its MLP. CheckpointError for what is
    neither there nor left out.
    """
    blocks = hf.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != integer(hf, "num_hidden_layers"):
        raise CheckpointError(
            f"config.json has {len(blocks) if isinstance(blocks, list) else 'no'} block_configs; "
            "wanted one for each of its num_hidden_layers"
        )
    if not all(isinstance(block, dict) for block in blocks):
        raise CheckpointError("config.json has block_configs that are no JSON objects; wanted one")
    found = [(json_object(block, "attention"), json_object(block, "ffn")) for block in blocks]
    for layer, (attention, ffn) in enumerate(found):
        for part, values in (("attention", attention), ("ffn", ffn)):
            for key in ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens"):
                if values.get(key):
                    raise CheckpointError(
                        f"config.json has {part}.{key}={values[key]!r} in layer {layer}; an engine "
                        "of the family knows only attention and an MLP, whole or left out"
                    )
    return found


def _deci_inner(hf: Hf, ffn: Mapping[str, Any]) -> int:
    if ffn.get("no_op"):
        return 0
    if ffn.get("intermediate_size") is not None:
        return integer(ffn, "intermediate_size")
    rows = int(2 * number(ffn, "ffn_mult") * integer(hf, "hidden_size") / 3)
    return -(-rows // _FFN_MULTIPLE) * _FFN_MULTIPLE


def deci_sizes(hf: Hf) -> dict[str, Any]:
    """What config.json says layer by layer and its readers want of the whole model."""
    blocks = deci_blocks(hf)
    groups = {
        integer(attention, "n_heads_in_group")
        for attention, _ in blocks
        if not attention.get("no_op")
    }
    if len(groups) != 1:
        raise CheckpointError(
            f"config.json has layers with n_heads_in_group={sorted(groups)}; an engine has as many "
            "KV heads in each layer: wanted one number"
        )
    heads = integer(hf, "num_attention_heads")
    return {
        "num_key_value_heads": max(1, heads // groups.pop()),
        "intermediate_size": max(_deci_inner(hf, ffn) for _, ffn in blocks),
    }


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
    "DeciLMForCausalLM": _deci,
    "Olmo3ForCausalLM": _olmo3,
    "Exaone4ForCausalLM": _exaone4,
    **mixture_keys.EXTRA,
}
# Of families that say layer by layer what others say once.
SIZES: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "DeciLMForCausalLM": deci_sizes,
    "GraniteMoeHybridForCausalLM": lambda hf: {
        "intermediate_size": integer(hf, "shared_intermediate_size", 1024)
    },
}

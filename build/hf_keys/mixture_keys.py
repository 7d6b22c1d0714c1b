"""The config.json keys of mixtures of experts, as TensorRT-LLM's MoeConfig, and those of families
of our own that have them.

Source: TensorRT-LLM 1.2.1's `MoeConfig`; transformers' configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.hf_keys.attention_keys import LATENT, latent_keys
from enginehouse.build.hf_keys.config_values import (
    SWIGLU,
    boolean,
    integer,
    number,
    refuse,
    whole_numbers,
)
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]


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


_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")


def read_experts(hf: Hf, renormalize: bool, shared: int = 0) -> dict[str, Any]:
    """renormalize: whether the shares of the chosen ones are scaled to sum to 1. shared: rows of
    the shared expert's gate.
    """
    key = next((name for name in _COUNTS if name in hf), _COUNTS[0])
    chosen = next((name for name in _CHOSEN if name in hf), _CHOSEN[0])
    count, top_k = integer(hf, key), integer(hf, chosen)
    if not 1 < count or top_k > count:
        raise CheckpointError(
            f"config.json has {key}={count}, {chosen}={top_k}; wanted two experts or "
            "more, and no more chosen than there are"
        )
    moe = moe_config(count, top_k, renormalize)
    return {**moe, "shared_expert_intermediate_size": shared}


def dense_layers(hf: Hf) -> dict[str, Any]:
    """Qwen's `mlp_only_layers` and `decoder_sparse_step`: layers with a plain MLP, if any."""
    listed = whole_numbers(hf, "mlp_only_layers")
    step, count = integer(hf, "decoder_sparse_step", 1), integer(hf, "num_hidden_layers")
    return _dense([i for i in range(count) if i in listed or (i + 1) % step])


def _dense(layers: list[int]) -> dict[str, Any]:
    return {"dense_layers": layers} if layers else {}


def _deepseek(hf: Hf) -> dict[str, Any]:
    """Scores by sigmoid, corrected; groups; shared experts; the first layers dense."""
    experts = read_experts(
        hf,
        renormalize=boolean(hf, "norm_topk_prob"),
        shared=integer(hf, "moe_intermediate_size") * whole_numbers(hf, "n_shared_experts")[0],
    )
    groups = {"device_limited_n_group": "n_group", "device_limited_topk_group": "topk_group"}
    experts |= {ours: integer(hf, theirs, 1) for ours, theirs in groups.items()}
    if experts["num_experts"] % experts["device_limited_n_group"]:
        raise CheckpointError(
            f"config.json has n_group={hf['n_group']}, which does not divide its "
            f"{experts['num_experts']} experts; wanted equal groups"
        )
    scale = number(hf, "routed_scaling_factor", 1.0)
    return {
        "moe": {**experts, "device_limited_routed_scaling_factor": scale, "scoring": "sigmoid"},
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
        **_dense(list(range(whole_numbers(hf, "first_k_dense_replace")[0]))),
    }


def _deepseek_v3(hf: Hf) -> dict[str, Any]:
    return {**latent_keys(hf), **_deepseek(hf)}


def _deepseek_v2(hf: Hf) -> dict[str, Any]:
    """Scores are a softmax; groups are judged by their best."""
    refuse(hf, "topk_method", ("greedy", "group_limited_greedy"))
    found = _deepseek({**hf, "norm_topk_prob": False})
    moe = {key: value for key, value in found["moe"].items() if key != "scoring"}
    if hf.get("topk_method", "greedy") == "greedy":
        moe |= {"device_limited_n_group": 1, "device_limited_topk_group": 1}
    return {**latent_keys(hf), **found, "moe": moe}


def _glm4_moe(hf: Hf) -> dict[str, Any]:
    return {**_deepseek(hf), "qk_layernorm": boolean(hf, "use_qk_norm")}


def _dots1(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    return {**_deepseek(hf), "qk_layernorm": True}


def _ernie_moe(hf: Hf) -> dict[str, Any]:
    refuse(hf, "use_bias", (False,))
    size, shared = integer(hf, "moe_intermediate_size"), whole_numbers(hf, "moe_num_shared_experts")
    count, step = integer(hf, "num_hidden_layers"), integer(hf, "moe_layer_interval", 1)
    first, last = (whole_numbers(hf, f"moe_layer_{end}_index")[0] for end in ("start", "end"))
    last = count - 1 if last == -1 else last
    has_none = [i for i in range(count) if not first <= i <= last or (i + 1) % step]
    return {
        "rope_interleaved": True,
        "moe": read_experts(hf, renormalize=True, shared=size * shared[0]),
        "moe_intermediate_size": size,
        **_dense(has_none),
    }


def qwen2_moe(hf: Hf) -> dict[str, Any]:
    refuse(hf, "use_sliding_window", (False,))
    shared = integer(hf, "shared_expert_intermediate_size")
    return {
        "moe": read_experts(hf, boolean(hf, "norm_topk_prob"), shared),
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
        **dense_layers(hf),
    }


def _hunyuan_moe(hf: Hf) -> dict[str, Any]:
    """Its lists of a number for each layer are read where all are one."""
    numbers = {key: _same_in_all(hf, key) for key in ("num_experts", "moe_topk")}
    shared = integer(hf, "intermediate_size")
    return {
        "qk_layernorm": True,
        "qk_layernorm_after_rope": True,
        "moe": read_experts({**hf, **numbers}, renormalize=True, shared=shared),
    }


def _same_in_all(hf: Hf, key: str) -> int:
    values = set(whole_numbers(hf, key))
    if len(values) != 1:
        raise CheckpointError(
            f"config.json has {key}={hf.get(key)!r}; wanted one number for all layers"
        )
    return values.pop()


def granite_multipliers(hf: Hf) -> dict[str, Any]:
    """Each is 1 where it is left out, the attention's too."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    return {name: number(hf, name, 1.0) for name in (*names, "logits_scaling")}


def _granite_moe(hf: Hf) -> dict[str, Any]:
    """Shares are a softmax over the chosen experts alone."""
    refuse(hf, "attention_bias", (False,))
    shared = whole_numbers(hf, "shared_intermediate_size")[0]
    return {**granite_multipliers(hf), "moe": read_experts(hf, renormalize=True, shared=shared)}


def _minimax(hf: Hf) -> dict[str, Any]:
    refuse(hf, "qk_norm_type", ("per_layer",))
    refuse(hf, "scoring_func", ("sigmoid",))
    if set(whole_numbers(hf, "attn_type_list")) - {0, 1} or 0 in hf.get("attn_type_list", ()):
        raise CheckpointError(
            f"config.json has attn_type_list={hf['attn_type_list']!r}; wanted 1, attention over "
            "keys, for every layer"
        )
    return {
        "qk_layernorm": True,
        "qk_layernorm_all_heads": True,
        "moe": {**read_experts(hf, renormalize=True), "scoring": "sigmoid"},
    }


def _phi_moe(hf: Hf) -> dict[str, Any]:
    """SparseMixer chooses two, whatever is asked for, and normalises each share by itself."""
    refuse(hf, "num_experts_per_tok", (2,))
    moe = {**read_experts(hf, renormalize=False), "normalization_mode": 2}  # SPARSE_MIXER
    moe["sparse_mixer_epsilon"] = number(hf, "router_jitter_noise")
    return {"layer_norm": True, "lm_head_bias": boolean(hf, "lm_head_bias"), "moe": moe}


def _gpt_oss(hf: Hf) -> dict[str, Any]:
    """Shares are a softmax over the chosen experts alone."""
    return {
        "moe": read_experts(hf, renormalize=True),
        "swiglu_limit": number(hf, "swiglu_limit"),
        "swiglu_alpha": number(hf, "swiglu_alpha"),
    }


def _llama4(hf: Hf) -> dict[str, Any]:
    """Layers with rope see chunks, the others all, with queries that grow."""
    refuse(hf, "attention_bias", (False,))
    count, every = integer(hf, "num_hidden_layers"), integer(hf, "no_rope_layer_interval", 4)
    turned = whole_numbers(hf, "no_rope_layers") or [
        int((i + 1) % every != 0) for i in range(count)
    ]
    step = integer(hf, "interleave_moe_layer_step", 1)
    listed = whole_numbers(hf, "moe_layers") or list(range(step - 1, count, step))
    grows = {key: number(hf, key) for key in ("attn_scale", "floor_scale")}
    if len(turned) < count:
        raise CheckpointError(
            f"config.json has {len(turned)} no_rope_layers; wanted one for each of {count} layers"
        )
    moe = read_experts(hf, False, shared=integer(hf, "moe_intermediate_size"))
    return {
        "rope_interleaved": True,
        "no_rope_layers": [i for i in range(count) if not turned[i]],
        "qk_l2norm": hf.get("use_qk_norm", True) is not False,
        **(grows if hf.get("attn_temperature_tuning", True) else {}),
        "attention_chunk_size": integer(hf, "attention_chunk_size"),
        "chunked_layers": [i for i in range(count) if turned[i]],
        "moe": {**moe, "scoring": "sigmoid of inputs"},
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
        **_dense([i for i in range(count) if i not in listed]),
    }


def llama4_sizes(hf: Hf) -> dict[str, Any]:
    """Its intermediate_size is an expert's, and intermediate_size_mlp of dense layers."""
    return {
        "moe_intermediate_size": integer(hf, "intermediate_size"),
        "intermediate_size": integer(hf, "intermediate_size_mlp"),
    }


def _over_all(hf: Hf) -> dict[str, Any]:
    for name, usual in (("attention_bias", False), ("clip_qkv", None)):
        refuse(hf, name, (usual,))
    moe = read_experts(hf, renormalize=boolean(hf, "norm_topk_prob"))
    return {"qk_layernorm": True, "qk_layernorm_all_heads": True, "moe": moe}


def _flex_olmo(hf: Hf) -> dict[str, Any]:
    return {**_over_all(hf), "input_layernorms": False, "inter_layernorms": True}


_FEW = {"n_shared_experts": 1, "first_k_dense_replace": 1}
# What Hugging Face's config class takes for a key that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        "num_key_value_heads": 16,
        "attention_bias": True,  # of q, k and v, for which the class has no such key
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "Glm4MoeForCausalLM": {
        **_FEW,
        "num_key_value_heads": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
    },
    "Dots1ForCausalLM": {
        "n_shared_experts": 0,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1408,
    },
    "Ernie4_5_MoeForCausalLM": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    "HunYuanMoEV1ForCausalLM": {},
    "GraniteMoeForCausalLM": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
    },
    "MiniMaxM2ForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rope_theta": 5e6,
        "attn_type_list": [1],
    },
    "PhiMoEForCausalLM": {
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "rope_theta": 1e6,
    },
    "GptOssForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    "OlmoeForCausalLM": {"num_experts": 64, "num_experts_per_tok": 8},
    "Llama4ForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "rope_theta": 5e5,
    },
    "DeepseekV2ForCausalLM": {
        **LATENT,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
    },
    "DeepseekV3ForCausalLM": {
        **LATENT,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "Glm4MoeLiteForCausalLM": {
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
    },
    "FlexOlmoForCausalLM": {"num_experts": 7, "num_experts_per_tok": 5, "rope_theta": 5e5},
}
DEFAULTS["GraniteMoeSharedForCausalLM"] = DEFAULTS["GraniteMoeForCausalLM"]
EXTRA: dict[str, Callable[[Hf], dict[str, Any]]] = {
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Glm4MoeForCausalLM": _glm4_moe,
    "Dots1ForCausalLM": _dots1,
    "Ernie4_5_MoeForCausalLM": _ernie_moe,
    "HunYuanMoEV1ForCausalLM": _hunyuan_moe,
    "GraniteMoeForCausalLM": _granite_moe,
    "GraniteMoeSharedForCausalLM": _granite_moe,
    "MiniMaxM2ForCausalLM": _minimax,
    "PhiMoEForCausalLM": _phi_moe,
    "GptOssForCausalLM": _gpt_oss,
    "OlmoeForCausalLM": _over_all,
    "Llama4ForCausalLM": _llama4,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Glm4MoeLiteForCausalLM": _deepseek_v3,
    "FlexOlmoForCausalLM": _flex_olmo,
}
ACTIVATIONS = dict.fromkeys(EXTRA, SWIGLU)

"""config.json of every family: the keys TensorRT-LLM wants, and what it cannot express."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers

from enginehouse.build.families.architectures import ARCHITECTURES
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.hf_keys.family_keys import ACTIVATIONS
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.runtime.checkpoint.traits import layer_windows, traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError
from makers.paths import ROOT

# What every checkpoint's config.json holds; a real one's other keys stand in the cases.
COMMON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
GEMMA3_V4 = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
}


def config_of(family: str, **keys: Any) -> ModelConfig:
    name = f"{family}ForCausalLM"
    return model_config({**COMMON, "architectures": [name], **keys}, "auto")


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Mistral", {"head_dim": 160}, {"head_size": 160, "qkv_bias": None, "hidden_act": "silu"}),
    (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {
            "hidden_act": "swiglu",
            "moe": {
                "num_experts": 8,
                "shared_expert_intermediate_size": 0,
                "top_k": 2,
                "normalization_mode": 1,
                "sparse_mixer_epsilon": 0.01,
                "tp_mode": 0,
                "device_limited_n_group": 0,
                "device_limited_topk_group": 0,
                "device_limited_routed_scaling_factor": 1.0,
            },
        },
    ),
    (
        "Qwen2",
        {},
        {
            "qwen_type": "qwen2",
            "seq_length": 8192,
            "attn_bias": True,
            "mlp_bias": False,
            "qk_layernorm": False,
            "moe_intermediate_size": 0,
            "moe_shared_expert_intermediate_size": 0,
            "use_logn_attn": False,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "num_labels": 1,
            "tie_word_embeddings": False,
        },
    ),
    (
        "Qwen3",
        {},
        {"qwen_type": "qwen3", "attn_bias": False, "qk_layernorm": True, "head_size": 128},
    ),
    (
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": True},
        {"qwen_type": "qwen3_moe", "moe_intermediate_size": 768, "hidden_act": "swiglu"},
    ),
    ("Phi3", {"partial_rotary_factor": 0.75}, {"rotary_pct": 0.75, "rotary_embedding_dim": 96}),
    (
        "Gemma",
        {"hidden_act": "gelu"},
        {
            "hidden_act": "gelu_pytorch_tanh",
            "head_size": 256,
            "tie_word_embeddings": True,
            "inter_layernorms": False,
        },
    ),
    (
        "Gemma2",
        {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 224},
        {
            "inter_layernorms": True,
            "query_pre_attn_scalar": 224,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_attention_window": [4096, 8192] * 3,
        },
    ),
    (
        "Gemma4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
        {
            "hidden_act": "geglu",
            "attention_multiplier": 1.0,
            "rotary_base": 1e6,
            "rope_local_base_freq": 1e4,
            "local_rope_layers": [0, 1, 2, 3, 4],
            "layer_head_sizes": [256] * 5 + [512],
            "layer_kv_heads": [4] * 5 + [2],
            "shared_projection_layers": [5],
            "kv_source_layers": None,
            "per_layer_input_size": 256,
            "max_attention_window": [512] * 5 + [8192],
        },
    ),
    (
        "Gemma4",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 0,
            "per_layer_config": {"1": {"head_dim": 128}},
        },
        {
            "local_rope_layers": [0, 2, 4],
            "layer_head_sizes": [256, 128, 256, 256, 256, 256],
            "layer_kv_heads": [4] * 6,
            "kv_source_layers": [0, 1, 2, 3, 2, 3],
            "layer_intermediate_sizes": [4096] * 4 + [8192] * 2,
            "per_layer_input_size": None,
        },
    ),
    (
        "Gemma3n",
        {
            "intermediate_size": [64] * 5 + [128],
            "num_kv_shared_layers": 0,
            "rope_theta": 1e6,
            "rope_local_base_freq": 5000,
        },
        {
            "intermediate_size": 128,
            "layer_intermediate_sizes": [64] * 5 + [128],
            "local_rope_layers": [0, 1, 2, 3, 5],
            "rope_local_base_freq": 5000.0,
            "activation_sparsity_pattern": [],
            "altup_num_inputs": 4,
            "laurel_rank": 64,
            "per_layer_vocab_size": 262144,
            "final_logit_softcapping": 30.0,
        },
    ),
    (
        "GPTNeoX",
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {
            "hidden_act": "gelu_erf",
            "num_key_value_heads": 8,
            "rotary_pct": 0.5,
            "rotary_base": 500.0,
            "attn_bias": True,
            "parallel_sublayers": True,
        },
    ),
    (
        "GPTNeoX",
        {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
        {"hidden_act": "gelu_pytorch_tanh", "parallel_sublayers": None, "rotary_pct": 0.25},
    ),
    (
        "PhiMoE",
        {"router_jitter_noise": 0.02, "sliding_window": 512},
        {
            "hidden_act": "swiglu",
            "rotary_base": 1e6,
            "attn_bias": False,
            "layer_norm": True,
            "lm_head_bias": False,
            "max_attention_window": [512] * 6,
            "moe": {
                "num_experts": 16,
                "shared_expert_intermediate_size": 0,
                "top_k": 2,
                "normalization_mode": 2,
                "sparse_mixer_epsilon": 0.02,
                "tp_mode": 0,
                "device_limited_n_group": 0,
                "device_limited_topk_group": 0,
                "device_limited_routed_scaling_factor": 1.0,
            },
        },
    ),
    (
        "Gemma2",
        {"attn_logit_softcapping": None, "sliding_window": None},
        {"attn_logit_softcapping": None, "max_attention_window": None},
    ),
    (
        "Gemma3",
        GEMMA3_V4,
        {
            "qk_layernorm": True,
            "rotary_base": 1e6,
            "rope_local_base_freq": 1e4,
            "rotary_scaling": {"factor": 8.0, "type": "linear", "rope_type": "linear"},
            "_sliding_window_pattern": 6,
            "sliding_window": 512,
            "max_attention_window": [512] * 5 + [8192],
        },
    ),
]


@pytest.mark.parametrize(("family", "keys", "wanted"), CASES)
def test_a_familys_keys_are_translated(
    family: str, keys: dict[str, Any], wanted: dict[str, Any]
) -> None:
    found = config_of(family, **keys).to_dict()
    assert {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(("family", "keys", "wanted"), CASES)
def test_config_json_reads_back_as_it_was_written(
    family: str, keys: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config = config_of(family, **keys)
    assert ModelConfig.from_dict(config.to_dict()) == config


MODEL_TYPES = {
    "Qwen3Moe": "qwen3_moe",
    "Qwen3Next": "qwen3_next",
    "Qwen3_5": "qwen3_5_text",
    "Qwen3_5Moe": "qwen3_5_moe_text",
    "Gemma3": "gemma3_text",
    "SeedOss": "seed_oss",
    "StableLm": "stablelm",
    "GraniteMoeHybrid": "granitemoehybrid",
    "HunYuanDenseV1": "hunyuan_v1_dense",
    "Qwen2Moe": "qwen2_moe",
    "Glm4Moe": "glm4_moe",
    "MiniMaxM2": "minimax_m2",
    "GptOss": "gpt_oss",
    "FlexOlmo": "flex_olmo",
    "DeepseekV3": "deepseek_v3",
    "Glm4MoeLite": "glm4_moe_lite",
    "GPTNeoX": "gpt_neox",
    "Gemma4": "gemma4_text",
    "Gemma3n": "gemma3n_text",
}
# Their classes have no defaults that make a model, or transformers has none.
WITHOUT_DEFAULTS = {"Gemma3n", "DeciLM", "GraniteMoeHybrid", "HunYuanMoEV1", "Dots1", "DeepseekV2"}
DEFAULTED = [name.removesuffix("ForCausalLM") for name in ARCHITECTURES]


@pytest.mark.parametrize("family", [name for name in DEFAULTED if name not in WITHOUT_DEFAULTS])
def test_a_key_that_is_left_out_is_what_transformers_takes(family: str, tmp_path: Path) -> None:
    """Enough heads for the default of every family, and a context longer than its windows."""
    heads = 20 if family == "Helium" else 32
    sizes = {**COMMON, "num_attention_heads": heads, "max_position_embeddings": 65536}
    del sizes["num_key_value_heads"]
    keys = {**sizes, "architectures": [f"{family}ForCausalLM"], "torch_dtype": "float16"}
    keys["model_type"] = MODEL_TYPES.get(family, family.lower())
    (tmp_path / "config.json").write_text(json.dumps(keys))
    whole = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert model_config(keys, "auto") == model_config(whole, "auto")


def test_both_versions_of_gemma_3s_rope_are_one() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = {"rope_parameters": nested, "layer_types": ["sliding_attention"] * 5}
    new["layer_types"] = [*new["layer_types"], "full_attention"]
    assert config_of("Gemma3", **GEMMA3_V4) == config_of("Gemma3", sliding_window=512, **new)


def test_phi_3s_longrope_is_written_for_both_readers() -> None:
    stretch = [1.0] * 64
    scaling = {"type": "su", "short_factor": stretch, "long_factor": stretch}
    config = config_of("Phi3", rope_scaling=scaling, original_max_position_embeddings=4096)
    found = config.to_dict()
    assert found["position_embedding_type"] == "long_rope"
    assert found["original_max_position_embeddings"] == 4096
    assert found["longrope_scaling_long_factors"] == stretch
    assert found["rotary_scaling"]["type"] == found["rotary_scaling"]["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("family", "keys", "wanted"),
    [
        ("Llama", {"sliding_window": 4096}, []),  # a key that its model does not read
        ("Mistral", {"sliding_window": None}, []),
        ("Mistral", {"sliding_window": 8192}, []),
        ("Mistral", {"sliding_window": 4096}, [4096] * 6),
        ("Qwen2", {"sliding_window": 4096}, []),
        ("Qwen2", {"sliding_window": 4096, "use_sliding_window": False}, []),
        (
            "Qwen2",
            {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4},
            [8192] * 4 + [4096] * 2,
        ),
        ("Phi3", {"sliding_window": 2047}, [2047] * 6),
        ("Qwen3Moe", {**EXPERTS, "sliding_window": 64, "use_sliding_window": True}, [64] * 6),
    ],
)
def test_a_window_counts_only_where_the_model_has_it(
    family: str, keys: dict[str, Any], wanted: list[int]
) -> None:
    config = config_of(family, **keys)
    assert config.extra.get("max_attention_window", []) == wanted
    seen = [w if w < 8192 else None for w in wanted] or [None] * 6
    assert layer_windows(config) == seen
    assert traits_of(config).windows == frozenset(seen)


def deci(*groups: int, **keys: Any) -> list[dict[str, Any]]:
    """block_configs of six layers."""
    attentions = [{"n_heads_in_group": group, **keys} for group in groups]
    return [{"attention": each, "ffn": {"ffn_mult": 3.0}} for each in attentions] * (
        6 // len(groups)
    )


@pytest.mark.parametrize(
    ("family", "keys", "wanted"),
    [
        ("Qwen3", {"attention_bias": True}, "attention_bias=True; .* knows only False"),
        ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": ["0"]}, "mlp_only_layers=.*; wanted whole num"),
        ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 9}, "num_experts=8, num_experts_per_tok=9"),
        ("Qwen3Moe", {"num_experts": 4}, "num_experts=4, num_experts_per_tok=8"),
        ("Gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma2", {"hidden_activation": "silu"}, "hidden_act='silu'; wanted 'gelu_pytorch_tanh'"),
        ("Gemma3", {**GEMMA3_V4, "attn_logit_softcapping": 50.0}, "softcapping=50.0; .* none"),
        (
            "Gemma3",
            {"layer_types": ["full_attention"] + ["sliding_attention"] * 5},
            "layer_types in no regular pattern",
        ),
        ("Gemma3", {"layer_types": ["full_attention"]}, "wanted 6 times sliding_attention or"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]; wanted 6 times 1, or 0"),
        ("SmolLM3", {"no_rope_layers": [1, 2] * 3}, "wanted 6 times 1, or 0 for a layer"),
        ("SmolLM3", {"use_sliding_window": True}, "use_sliding_window=True; .* only False"),
        (
            "Granite",
            {"residual_multiplier": -1},
            "residual_multiplier=-1; wanted a positive number",
        ),
        ("StableLm", {"use_parallel_residual": True}, "use_parallel_residual=True; .* only False"),
        ("Cohere", {"use_qk_norm": True}, "use_qk_norm=True; .* only False"),
        ("Nemotron", {"hidden_act": "silu"}, "hidden_act='silu'; wanted 'relu2'"),
        ("Nemotron", {"partial_rotary_factor": 0.01}, "partial_rotary_factor=0.01, which rotates"),
        ("Olmo2", {"attention_bias": True}, "attention_bias=True; .* only False"),
        ("SeedOss", {"attention_out_bias": True}, "attention_out_bias=True; .* only False"),
        ("Ernie4_5", {"use_bias": 3}, "use_bias=3; wanted true or false"),
        (
            "Gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2}}},
            "rope type 'yarn' on sliding layers",
        ),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope"}},
            "no list as short_factor .* wanted 64",
        ),
        ("Phi3", {"partial_rotary_factor": 0.26}, "rotates 33 of 128 elements; wanted an even"),
        ("Gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50'; wanted a pos"),
        (
            "Qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": "all"},
            "max_window_layers='all'; wanted a whole number",
        ),
        ("Llama", {"tie_word_embeddings": "false"}, "embeddings='false'; wanted true or false"),
        ("Qwen2", {"sliding_window": 9, "use_sliding_window": "no"}, "window='no'; wanted true or"),
        ("Llama", {"rope_theta": float("inf")}, "rope_theta=inf; wanted a positive number"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; wanted 1.0"),
        ("Glm4Moe", {"n_group": 3}, "n_group=3, which does not divide its 128 experts"),
        ("HunYuanMoEV1", {"num_experts": [8, 4] * 3}, "num_experts=.*; wanted one number for all"),
        ("MiniMaxM2", {"attn_type_list": [1, 0] * 3}, "attn_type_list=.*; wanted 1, attention"),
        ("GraniteMoeHybrid", {"layer_types": ["mamba"] * 6}, "knows only attention, no Mamba"),
        ("GraniteMoeHybrid", {}, r"layer_types=\[\]; .* only attention"),
        ("DeciLM", {}, "has no block_configs; wanted one for each"),
        ("DeciLM", {"block_configs": [{}] * 5}, "has 5 block_configs; wanted one for each"),
        ("DeciLM", {"block_configs": [7] * 6}, "block_configs that are no JSON objects"),
        ("DeciLM", {"block_configs": deci(8, 4)}, r"n_heads_in_group=\[4, 8\]; .* one number"),
        (
            "DeciLM",
            {"block_configs": deci(8, 8, replace_with_linear=True)},
            "attention.replace_with_linear=True in layer 0; .* whole or left out",
        ),
        ("GPTNeoX", {"use_parallel_residual": 1.5}, "parallel_residual=1.5; .* only True"),
        ("GPTNeoX", {"hidden_act": "gelu_10"}, "hidden_act='gelu_10'; wanted 'gelu'"),
        ("Gemma4", {"use_bidirectional_attention": "all"}, "attention='all'; .* only None"),
        ("Gemma4", {"num_kv_shared_layers": 6}, "layers=6, and no layer before them of each type"),
        ("Gemma4", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "of intermediate_size;"),
        ("Gemma4", {"per_layer_config": {"1": {"head_dim": 33}}}, "layer 1 heads of 33 and 4 KV"),
        ("Gemma4", {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "of 256 and 3 KV"),
        (
            "Gemma4",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
            "rope type 'yarn' on full layers; wanted proportional",
        ),
        (
            "Gemma4",
            {**EXPERTS, "enable_moe_block": True, "top_k_experts": 2, "use_double_wide_mlp": True},
            "use_double_wide_mlp and enable_moe_block",
        ),
        ("Gemma3n", {"intermediate_size": [8, 8]}, "has 2 of intermediate_size; wanted one number"),
        ("Gemma3n", {"altup_active_idx": 1}, "altup_active_idx=1; .* only 0"),
        ("Gemma3n", {"altup_correct_scale": False}, "correct_scale=False; .* only True"),
        (
            "Gemma3n",
            {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [1.0] * 6},
            "wanted 6 numbers from 0 to below 1",
        ),
        ("PhiMoE", {"num_experts_per_tok": 1}, "num_experts_per_tok=1; .* knows only 2"),
        ("PhiMoE", {"router_jitter_noise": -1}, "router_jitter_noise=-1; wanted a positive"),
        (
            "PhiMoE",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope type 'linear'; a PhiMoE knows only longrope",
        ),
        (
            "PhiMoE",
            {"rope_scaling": {"type": "longrope", "short_mscale": 1.2}},
            "has no long_mscale",
        ),
        ("Phi", {"qk_layernorm": True}, "qk_layernorm=True; .* only False"),
        ("InternLM3", {"qkv_bias": True}, "qkv_bias=True; .* only False"),
        ("HunYuanDenseV1", {"rope_scaling": {"type": "dynamic"}}, "has no factor"),
        ("Llama", {"rope_scaling": {"type": "llama3", "factor": 8}}, "has no low_freq_factor"),
        ("Falcon", {}, "FalconForCausalLM is not supported; .*Qwen3Moe.*Phi3.*Gemma3"),
    ],
)
def test_what_a_family_cannot_express_is_refused(
    family: str, keys: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(CheckpointError, match=wanted):
        config_of(family, **keys)


def sizes(*numbers: int, **keys: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    return {**dict(zip((*names, *heads), numbers, strict=True)), **keys}


# Published models: the sizes of their config.json, and the parameters their authors count.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Mistral-7B-v0.3": ("Mistral", sizes(32768, 4096, 14336, 32, 32, 8), 7_248_023_552),
    "Mistral-Nemo": (
        "Mistral",
        sizes(131072, 5120, 14336, 40, 32, 8, head_dim=128),
        12_247_782_400,
    ),
    "Mixtral-8x7B": ("Mixtral", sizes(32000, 4096, 14336, 32, 32, 8), 46_702_792_704),
    "Qwen2.5-7B": ("Qwen2", sizes(152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen2.5-0.5B": (
        "Qwen2",
        sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3-8B": ("Qwen3", sizes(151936, 4096, 12288, 36, 32, 8), 8_190_735_360),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        sizes(
            *(151936, 2048, 6144, 48, 32, 4),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "Phi-3.5-mini": ("Phi3", sizes(32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "Phi-4-mini": (
        "Phi3",
        sizes(200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True),
        3_836_021_760,
    ),
    "gpt-oss-20b": (
        "GptOss",
        sizes(201088, 2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32),
        20_914_757_184,
    ),
    "Phi-3.5-MoE": (
        "PhiMoE",
        sizes(32064, 4096, 6400, 32, 32, 8, attention_bias=True, lm_head_bias=True),
        41_873_153_344,
    ),
    "Qwen1.5-MoE-A2.7B": ("Qwen2Moe", sizes(151936, 2048, 5632, 24, 16, 16), 14_315_784_192),
    "gemma-2b": ("Gemma", sizes(256000, 2048, 16384, 18, 8, 1), 2_506_172_416),
    "gemma-2-9b": ("Gemma2", sizes(256000, 3584, 14336, 42, 16, 8), 9_241_705_984),
    "gemma-3-1b": ("Gemma3", sizes(262144, 1152, 6912, 26, 4, 1), 999_885_952),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_parameters_are_all_counted(name: str) -> None:
    family, keys, count = PUBLISHED[name]
    assert (
        sum(prod(shape) for shape in expected_shapes(config_of(family, **keys)).values()) == count
    )


def test_every_family_has_an_activation_and_is_in_the_docs() -> None:
    assert ACTIVATIONS.keys() == ARCHITECTURES.keys()
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in text] == []

"""Tiny random models of every family, made with transformers' own classes.

Sizes that TP 1 and 2, PP 1 and 2 and int4 groups of 64 can cut. The weights have unit gain, so
that logits are far apart, and norms and biases are drawn too, so that a wrong one shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from makers.deci_model import deci_keys, deci_model
from makers.engines import train_tokenizer

VOCAB = 512
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SHORT, LONG = [1.0 + i / 8 for i in range(16)], [1.5 + i / 2 for i in range(16)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
QWEN_EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
)
GEMMA2: dict[str, Any] = dict(head_dim=32, query_pre_attn_scalar=4, sliding_window=16)

GEMMA4: dict[str, Any] = dict(
    head_dim=32,
    global_head_dim=64,
    sliding_window=16,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=VOCAB,
)
TWO_TYPES: dict[str, Any] = dict(layer_types=["sliding_attention", "full_attention"])

GRANITE: dict[str, Any] = dict(
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.0625,
    logits_scaling=8.0,
)
# Sigmoid scores, groups, shared experts, one dense layer.
DEEPSEEK: dict[str, Any] = dict(
    head_dim=32,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)

LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=32,
)

DELTA: dict[str, Any] = dict(
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    layer_types=["linear_attention", "full_attention"],
)

# name: transformers' config class and what differs from SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(rope_parameters={"rope_theta": 5e5, **LLAMA3})),
    "mistral": ("MistralConfig", dict(sliding_window=16)),
    "mistral-nemo": ("MistralConfig", dict(sliding_window=None, head_dim=64)),
    "qwen2": ("Qwen2Config", dict(rope_parameters={"rope_theta": 1e6, **YARN})),
    "qwen2-tied": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2-window": (
        "Qwen2Config",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", dict(head_dim=64, tie_word_embeddings=True)),
    "phi3": ("Phi3Config", dict(sliding_window=20)),
    "phi3-longrope": (
        "Phi3Config",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=32),
    ),
    "phi4-mini": (
        "Phi3Config",
        dict(
            rope_parameters={
                **LONGROPE,
                "short_factor": SHORT[:12],
                "long_factor": LONG[:12],
                "partial_rotary_factor": 0.75,
            },
            original_max_position_embeddings=256,
            tie_word_embeddings=True,
        ),
    ),
    "nemotron": ("NemotronConfig", {}),
    "arcee": ("ArceeConfig", dict(attention_bias=True, mlp_bias=True)),
    "starcoder2": ("Starcoder2Config", dict(sliding_window=16)),
    "stablelm": ("StableLmConfig", dict(use_qkv_bias=True)),
    "cohere": ("CohereConfig", dict(logit_scale=0.25)),
    "cohere2": (
        "Cohere2Config",
        dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    ),
    "glm": ("GlmConfig", dict(head_dim=32)),
    "glm4": ("Glm4Config", dict(head_dim=32)),
    "ernie4.5": ("Ernie4_5Config", dict(head_dim=64)),
    "ernie4.5-biased": ("Ernie4_5Config", dict(use_bias=True, tie_word_embeddings=False)),
    "helium": ("HeliumConfig", dict(head_dim=32)),
    "granite": (
        "GraniteConfig",
        dict(
            GRANITE,
        ),
    ),
    "smollm3": ("SmolLM3Config", dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "seed-oss": ("SeedOssConfig", dict(head_dim=64)),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": (
        "Olmo3Config",
        dict(
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_theta": 5e5, **YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
    ),
    "exaone4": (
        "Exaone4Config",
        dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    ),
    "exaone4-whole": (
        "Exaone4Config",
        dict(sliding_window=None, layer_types=["full_attention"] * 2),
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        dict(
            GRANITE,
            layer_types=["attention"] * 2,
            num_local_experts=0,
            shared_intermediate_size=256,
            position_embedding_type="rope",
        ),
    ),
    "granite-hybrid-nope": (
        "GraniteMoeHybridConfig",
        dict(
            GRANITE,
            layer_types=["attention"] * 2,
            num_local_experts=0,
            shared_intermediate_size=256,
        ),
    ),
    "olmo": ("OlmoConfig", dict(clip_qkv=0.5)),
    "internlm3": ("InternLM3Config", dict(head_dim=64)),
    "cwm": (
        "CwmConfig",
        dict(
            head_dim=32,
            sliding_window=16,
            rope_parameters={"rope_theta": 1e6, **LLAMA3},
            tie_word_embeddings=True,
        ),
    ),
    "ministral": ("MinistralConfig", dict(head_dim=32, sliding_window=16)),
    "ministral3": (
        "Ministral3Config",
        dict(
            head_dim=32,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        ),
    ),
    "hunyuan": (
        "HunYuanDenseV1Config",
        dict(
            head_dim=32,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "factor": 1.0,
                "alpha": 100.0,
            },
        ),
    ),
    "phi": ("PhiConfig", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-serial": (
        "GPTNeoXConfig",
        dict(use_parallel_residual=False, hidden_act="gelu_fast", attention_bias=False),
    ),
    "youtu": ("YoutuConfig", dict(LATENT, head_dim=16, pad_token_id=None)),
    "nemotron-nas": ("LlamaConfig", dict(num_hidden_layers=4)),
    "gemma": ("GemmaConfig", dict(head_dim=64)),
    "gemma2": (
        "Gemma2Config",
        dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            GEMMA2,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gemma4": (
        "Gemma4TextConfig",
        dict(GEMMA4, **TWO_TYPES, attention_k_eq_v=True, num_global_key_value_heads=1),
    ),
    "gemma4-small": (
        "Gemma4TextConfig",
        dict(
            {**GEMMA4, "hidden_size_per_layer_input": 16},
            num_hidden_layers=6,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        dict(
            GEMMA4,
            **TWO_TYPES,
            attention_k_eq_v=True,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=64,
        ),
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        dict(
            {key: GEMMA4[key] for key in ("head_dim", "sliding_window")},
            num_hidden_layers=6,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB - 12,
            num_kv_shared_layers=3,
            laurel_rank=16,
            activation_sparsity_pattern=[0.95, 0.5, 0.0, 0.0, 0.9, 0.0],
            intermediate_size=[256, 256, 256, 512, 512, 256],
        ),
    ),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", dict(QWEN_EXPERTS, norm_topk_prob=True)),
    "granite-moe": (
        "GraniteMoeConfig",
        dict(EXPERTS, residual_multiplier=0.5, attention_multiplier=0.125, logits_scaling=2.0),
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64)),
    "qwen3-moe-raw": ("Qwen3MoeConfig", dict(QWEN_EXPERTS, norm_topk_prob=False)),
    "qwen3-moe-dense": (
        "Qwen3MoeConfig",
        dict(QWEN_EXPERTS, norm_topk_prob=True, mlp_only_layers=[0], intermediate_size=128),
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        dict(QWEN_EXPERTS, head_dim=32, shared_expert_intermediate_size=128),
    ),
    "glm4-moe": ("Glm4MoeConfig", dict(DEEPSEEK, use_qk_norm=True, attention_bias=True)),
    "glm4-moe-air": ("Glm4MoeConfig", dict(DEEPSEEK, n_group=1, topk_group=1)),
    "dots1": ("Dots1Config", dict(DEEPSEEK, sliding_window=None)),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=2),
    ),
    "granite-moe-shared": (
        "GraniteMoeSharedConfig",
        dict(EXPERTS, shared_intermediate_size=64, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        dict(EXPERTS, intermediate_size=64, head_dim=32, rotary_dim=16),
    ),
    "hunyuan-moe": (
        "HunYuanMoEV1Config",
        dict(num_experts=4, moe_topk=2, head_dim=32, intermediate_size=64),
    ),
    "flex-olmo": ("FlexOlmoConfig", dict(num_experts=4, num_experts_per_tok=2)),
    "llama4": (
        "Llama4TextConfig",
        dict(
            EXPERTS,
            head_dim=32,
            intermediate_size=64,
            intermediate_size_mlp=192,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            attention_chunk_size=16,
            floor_scale=16,
            attn_scale=0.5,
        ),
    ),
    "llama4-chunked": (
        "Llama4TextConfig",
        dict(
            {**EXPERTS, "num_experts_per_tok": 1},
            head_dim=32,
            intermediate_size=64,
            intermediate_size_mlp=192,
            moe_layers=[0, 1],
            no_rope_layers=[1, 1],
            attention_chunk_size=24,
            use_qk_norm=False,
        ),
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        dict(
            {**DEEPSEEK, **LATENT, "head_dim": 16, "norm_topk_prob": False},
            topk_method="group_limited_greedy",
        ),
    ),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        dict(
            {**DEEPSEEK, **LATENT, "head_dim": 16, "norm_topk_prob": False},
            q_lora_rank=None,
            topk_method="greedy",
        ),
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        dict(
            {**DEEPSEEK, **LATENT, "head_dim": 16},
            rope_parameters={"rope_theta": 1e4, **YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", dict({**DEEPSEEK, **LATENT, "head_dim": 16})),
    "qwen3.5": ("Qwen3_5TextConfig", dict(DELTA)),
    "qwen3.5-moe": (
        "Qwen3_5MoeTextConfig",
        dict({**DELTA, **QWEN_EXPERTS}, shared_expert_intermediate_size=128),
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        dict(
            {**DELTA, **QWEN_EXPERTS},
            shared_expert_intermediate_size=64,
            mlp_only_layers=[0],
            rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
    ),
    "phimoe": (
        "PhimoeConfig",
        dict(
            num_local_experts=8,
            intermediate_size=64,
            router_jitter_noise=0.2,
            attention_bias=True,
            lm_head_bias=True,
            rope_parameters={
                **{**LONGROPE, "rope_theta": 1e4, "original_max_position_embeddings": 256},
                **{"short_mscale": 1.25, "long_mscale": 1.5},
            },
        ),
    ),
    "phimoe-tied": ("PhimoeConfig", dict(EXPERTS, sliding_window=16, tie_word_embeddings=True)),
    "gpt-oss": (
        "GptOssConfig",
        dict(
            EXPERTS,
            head_dim=32,
            sliding_window=16,
            swiglu_limit=1.0,
            rope_parameters={"rope_theta": 1.5e5, "truncate": False, **YARN},
        ),
    ),
}
# Of these our TensorRT network does not do all.
BEYOND_TENSORRT = {
    *("qwen3.5", "qwen3.5-moe", "qwen3-next"),
    *("gemma3n", "gemma4", "gemma4-small", "gemma4-moe"),
}
# Whose layers differ in their heads, read the keys of others or get inputs of their own.
OF_OWN_LAYERS = {"gemma3n", "gemma4", "gemma4-small", "gemma4-moe"}
MIXTURES = {
    *("granite-moe", "olmoe", "mixtral", "qwen3-moe", "qwen3-moe-raw", "qwen3-moe-dense"),
    *("qwen2-moe", "glm4-moe", "glm4-moe-air", "dots1", "ernie4.5-moe", "granite-moe-shared"),
    *("minimax-m2", "hunyuan-moe", "flex-olmo", "gpt-oss", "phimoe", "phimoe-tied"),
    *("deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4-moe-lite", "llama4"),
    *("llama4-chunked", "qwen3.5-moe", "qwen3-next", "gemma4-moe"),
}
# Whose MLPs are of several sizes.
OF_SEVERAL_SIZES = {
    *("qwen3-moe-dense", "qwen2-moe", "glm4-moe", "glm4-moe-air", "dots1", "ernie4.5-moe"),
    *("granite-moe-shared", "hunyuan-moe", "llama4", "llama4-chunked", "gemma4-moe"),
    *("qwen3.5-moe", "qwen3-next", "gemma3n", "gemma4-small"),
}
# Of each way in which a family's tensors are named, fused, biased, normed or left out: what forms
# of weights meet.
OF_ALL_KINDS = (
    *("llama", "qwen2-tied", "qwen3", "phi3", "gemma2", "nemotron", "starcoder2", "cohere", "glm4"),
    *("granite-hybrid", "olmo", "phi", "nemotron-nas", "youtu", "mixtral", "qwen3-moe-dense"),
    *("qwen2-moe", "dots1", "granite-moe-shared", "gpt-oss", "llama4", "deepseek-v3"),
    *("qwen3.5", "qwen3-next", "gpt-neox", "gemma3n", "gemma4-small", "gemma4-moe", "phimoe"),
)
UNSCALED = ("Gemma3nTextConfig", "Gemma4TextConfig")
LATENTS = {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4-moe-lite", "youtu"}


def save_family(name: str, path: Path, **sizes: Any) -> Path:
    """A checkpoint of the family in float32, with a tokenizer; equal names and sizes give equal
    bytes.
    """
    kind, changes = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SIZES, **changes, **sizes}, dtype="float32")
    is_deci = name == "nemotron-nas"
    model = deci_model(config) if is_deci else AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for full_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if kind == "NemotronConfig" and full_name.endswith("norm.weight"):
                parameter.zero_()  # one is added to it; transformers begins with ones all the same
            if kind in ("Gemma3nTextConfig", "Gemma4TextConfig") and full_name.endswith(
                "q_norm.weight"
            ):
                parameter.fill_(0.2)  # its scores have no scale beside that
            if full_name.endswith("sinks"):
                parameter.copy_(noise)
            elif full_name.endswith("pre_feedforward_layernorm_2.weight"):
                parameter += noise  # experts are chosen without it
            elif parameter.ndim == 1:
                parameter += 0.1 * noise  # of linear attention it tells speeds apart too
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for full_name, buffer in model.named_buffers():
            noise = 0.1 * torch.randn(buffer.shape, generator=generator)
            if full_name.endswith("e_score_correction_bias"):
                buffer.copy_(noise)
            if full_name.endswith("layer_scalar"):
                buffer += noise
    model.save_pretrained(path)
    if is_deci:
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**written, **deci_keys()}))
    train_tokenizer(VOCAB).save(str(path / "tokenizer.json"))
    return path


def load_family(path: Path) -> PreTrainedModel:
    """transformers' model, its attention in plain products, as soft caps need them."""
    if "block_configs" in json.loads((path / "config.json").read_text()):
        changes = FAMILIES["nemotron-nas"][1]
        deci = deci_model(transformers.LlamaConfig(**{**SIZES, **changes}))
        deci.load_state_dict(load_file(path / "model.safetensors"))
        return deci.eval()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab_size], the whole sequence at once and nothing cached."""
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits

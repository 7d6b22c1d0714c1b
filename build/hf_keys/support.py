"""Which models each family is, how it differs from Llama, and which backends run it: one table.

The torch backend and the kernels run all; what TensorRT engines do is asked of the code that
refuses, for the configuration of the family's released models. Printed by `enginehouse families`,
written into docs/families.md by scripts/family_table.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from enginehouse.build.families.architectures import ARCHITECTURES
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.runtime.checkpoint.traits import beyond_tensorrt


class Note(NamedTuple):
    """models: that are released. differs: from Llama, in names and traits. keys: of config.json,
    where released models have other values than the class of transformers.
    """

    models: str
    differs: str
    keys: dict[str, Any] = {}


class Support(NamedTuple):
    """A row. tensorrt: None where our network runs it, else what of it that does not do."""

    architecture: str
    note: Note
    tensorrt: str | None
    for_trtllm: bool


NOTES: dict[str, Note] = {
    "LlamaForCausalLM": Note(
        "Llama 2, 3.x, Nemotron-Llama (8B, 70B), SmolLM2, TinyLlama, Falcon 3", ""
    ),
    "MistralForCausalLM": Note(
        "Mistral 7B, Nemo, Small, and the text model of `Mistral3ForConditionalGeneration` "
        "(Small 3.1, 3.2)",
        "explicit `head_dim`; attention window",
    ),
    "MixtralForCausalLM": Note("Mixtral 8x7B, 8x22B", "experts; `moe`; `hidden_act` swiglu"),
    "Qwen2ForCausalLM": Note(
        "Qwen2, Qwen2.5, and the text model of `Qwen2_5_VLForConditionalGeneration`",
        "bias on q, k, v only; `qwen_type`, `seq_length` and the rest of `QWenConfig`; window on "
        "upper layers when asked for",
    ),
    "Qwen3ForCausalLM": Note(
        "Qwen3 (dense), and the text model of `Qwen3VLForConditionalGeneration`",
        "norms on q and k heads; explicit `head_dim`; no bias",
    ),
    "Qwen3MoeForCausalLM": Note(
        "Qwen3-30B-A3B, 235B-A22B", "Qwen3 with experts; `moe_intermediate_size`"
    ),
    "Phi3ForCausalLM": Note(
        "Phi-3 mini, medium; Phi-3.5 mini; Phi-4, Phi-4 mini",
        "source has `qkv_proj` and `gate_up_proj` fused; `mlp.fc` holds up, then gate; no "
        "`mlp.gate`; longrope; `rotary_pct`",
    ),
    "GemmaForCausalLM": Note(
        "Gemma 1",
        "every norm's weight is written plus one; embeddings scaled by sqrt(hidden); tanh GELU; "
        "tied",
    ),
    "Gemma2ForCausalLM": Note(
        "Gemma 2",
        "Gemma with norms before and after both sublayers, soft caps on attention and logits, "
        "`query_pre_attn_scalar`, every other layer windowed",
    ),
    "Gemma3ForCausalLM": Note(
        "Gemma 3 (270M, 1B), and the text model of `Gemma3ForConditionalGeneration` (4B, 12B, 27B)",
        "Gemma 2 with q and k norms, no attention cap, a local rope base, five windowed layers in "
        "six",
    ),
    "NemotronForCausalLM": Note(
        "Nemotron-4, Minitron 4B, 8B",
        "LayerNorm whose weight is written plus one (`layer_norm`); an MLP of two linears and a "
        "squared ReLU (`gated_mlp`); half of each head is turned",
    ),
    "ArceeForCausalLM": Note("AFM 4.5B", "an MLP of two linears and a squared ReLU"),
    "Starcoder2ForCausalLM": Note(
        "StarCoder2 3B, 7B, 15B",
        "LayerNorm, an MLP of two linears and tanh GELU, biases everywhere; attention window",
    ),
    "StableLmForCausalLM": Note(
        "StableLM 2 1.6B, 3B", "LayerNorm; a quarter of each head is turned; bias on q, k, v"
    ),
    "CohereForCausalLM": Note(
        "Command R, R+, Aya 23",
        "attention and MLP beside each other, of one LayerNorm without a bias "
        "(`parallel_sublayers`); `rope_interleaved`; `logit_scale`; tied",
    ),
    "Cohere2ForCausalLM": Note(
        "Command R7B, Command A, Aya Expanse 2",
        "Cohere with three windowed layers in four, and the fourth without rope",
    ),
    "GlmForCausalLM": Note(
        "GLM-4 9B",
        "half of each head is turned, in neighbouring pairs (`rope_interleaved`); bias on q, k, v; "
        "`gate_up_proj` fused as Phi-3's",
    ),
    "Glm4ForCausalLM": Note(
        "GLM-4-0414 9B, 32B; GLM-Z1", "GLM with norms before and after both sublayers"
    ),
    "Ernie4_5ForCausalLM": Note("ERNIE 4.5 0.3B", "`rope_interleaved`; `use_bias`; tied"),
    "HeliumForCausalLM": Note("Helium 1 2B", "`rope_interleaved`"),
    "GraniteForCausalLM": Note(
        "Granite 3.x (dense)",
        "multipliers of embeddings, attention, what sublayers give, and logits",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "GraniteMoeForCausalLM": Note(
        "Granite 3.x MoE 1B, 3B", "Granite with experts", {"residual_multiplier": 0.22}
    ),
    "SmolLM3ForCausalLM": Note("SmolLM3 3B", "every fourth layer without rope (`no_rope_layers`)"),
    "SeedOssForCausalLM": Note("Seed-OSS 36B", "bias on q, k, v only; explicit `head_dim`"),
    "OlmoeForCausalLM": Note(
        "OLMoE 1B-7B", "experts; norms on q and k over all heads (`qk_layernorm_all_heads`)"
    ),
    "Olmo2ForCausalLM": Note(
        "OLMo 2 1B to 32B",
        "norms behind attention and MLP, none before (`input_layernorms`); norms on q and k over "
        "all heads (`qk_layernorm_all_heads`)",
    ),
    "Olmo3ForCausalLM": Note(
        "Olmo 3 7B, 32B", "OLMo 2 with three windowed layers in four, whose rope has no scaling"
    ),
    "Exaone4ForCausalLM": Note(
        "EXAONE 4.0 1.2B, 32B",
        "norms behind attention and MLP, none before; norms on q and k heads; in the 32B three "
        "windowed layers in four, and the fourth without rope",
    ),
}
NOTES |= {
    "GraniteMoeHybridForCausalLM": Note(
        "Granite 4.0 (dense: 350M, 1B)",
        "Granite whose MLP is `shared_mlp`, gate and up fused; with `position_embedding_type` nope "
        "no layer turns anything; Mamba layers are refused",
        {"layer_types": ["attention"] * 8, "num_local_experts": 0, "residual_multiplier": 0.22},
    ),
    "InternLM3ForCausalLM": Note("InternLM3 8B", ""),
    "CwmForCausalLM": Note("CWM 32B", "three windowed layers in four"),
    "MinistralForCausalLM": Note("Ministral 8B", "attention window"),
    "Ministral3ForCausalLM": Note(
        "the text model of `Mistral3ForConditionalGeneration` (Ministral 3 3B, 8B, 14B)",
        "yarn; queries that grow with their position (`llama_4_scaling_beta`)",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 512,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "HunYuanDenseV1ForCausalLM": Note(
        "Hunyuan 0.5B to 7B",
        "norms on q and k heads behind rope (`qk_layernorm_after_rope`); a rope whose base an "
        "`alpha` stretches",
    ),
    "PhiForCausalLM": Note(
        "Phi-1, Phi-1.5, Phi-2",
        "attention and MLP beside each other, of one LayerNorm; an MLP of two linears and tanh "
        "GELU; biases everywhere, of lm_head too (`lm_head_bias`); half of each head is turned",
    ),
    "OlmoForCausalLM": Note(
        "OLMo 1B, 7B", "LayerNorm without weights (`norm_weights`); `clip_qkv`"
    ),
    "DeciLMForCausalLM": Note(
        "Llama-Nemotron Super 49B, Ultra 253B",
        "layers without attention (`no_attention_layers`) or MLP, and MLPs of several sizes "
        "(`layer_intermediate_sizes`)",
        {
            "block_configs": [
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 3.0}},
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            ]
            * 4
        },
    ),
    "Qwen2MoeForCausalLM": Note(
        "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        "Qwen2 with experts, and one that every token sees, with a gate of its own "
        "(`mlp.shared_expert`)",
    ),
    "Glm4MoeForCausalLM": Note(
        "GLM-4.5, GLM-4.6, GLM-4.5-Air",
        "experts chosen by sigmoids with corrections (`moe.scoring`), in groups; a shared expert; "
        "dense layers first (`dense_layers`); half of each head is turned; norms on q and k heads "
        "where config.json says so",
    ),
    "Dots1ForCausalLM": Note(
        "dots.llm1 142B-A14B",
        "experts as GLM-4.5's; norms on q and k heads",
        {"n_routed_experts": 8, "num_experts_per_tok": 2},
    ),
    "Ernie4_5_MoeForCausalLM": Note(
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        "ERNIE 4.5 with experts whose scores are corrected, a shared one, and a dense layer first",
    ),
    "HunYuanMoEV1ForCausalLM": Note(
        "Hunyuan-A13B", "Hunyuan with experts and a shared one", {"num_experts": 8, "moe_topk": 2}
    ),
    "GraniteMoeSharedForCausalLM": Note(
        "Granite 3.x MoE with a shared expert",
        "Granite MoE with a shared expert",
        {"residual_multiplier": 0.22, "shared_intermediate_size": 512},
    ),
    "MiniMaxM2ForCausalLM": Note(
        "MiniMax-M2",
        "experts chosen by sigmoids with corrections; norms on q and k over all heads; half of "
        "each head is turned (`rotary_dim`)",
    ),
    "PhiMoEForCausalLM": Note(
        "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
        "experts chosen by SparseMixer (`normalization_mode` 2, `sparse_mixer_epsilon`); "
        "LayerNorm; biases of attention and of lm_head (`lm_head_bias`); longrope with magnitudes "
        "of its own (`short_mscale`, `long_mscale`); attention window",
        {"attention_bias": True, "lm_head_bias": True},
    ),
    "GptOssForCausalLM": Note(
        "gpt-oss 20b, 120b",
        "experts with biases and clamped gates (`swiglu_limit`, `swiglu_alpha`); a score for each "
        "head that nothing is read at (`attention.sinks`); biases of attention; every other layer "
        "windowed; yarn",
    ),
    "Llama4ForCausalLM": Note(
        "the text model of `Llama4ForConditionalGeneration` (Scout, Maverick)",
        "three layers in four see chunks, turned in neighbouring pairs, with norms without weights "
        "behind rope; the fourth sees all, not turned, with queries that grow with their position; "
        "experts whose inputs a sigmoid scales, a shared one, dense layers between",
    ),
    "DeepseekV2ForCausalLM": Note(
        "DeepSeek-V2, V2-Lite, Coder-V2",
        "latent attention: keys and values are kept compressed (`kv_lora_rank`), as one head for "
        "all; experts by softmax, in groups; shared experts; dense layers first",
        {"num_experts_per_tok": 6, "moe_intermediate_size": 1536},
    ),
    "DeepseekV3ForCausalLM": Note(
        "DeepSeek-V3, R1, V3.1; Kimi K2; Moonlight",
        "DeepSeek-V2 with experts as GLM-4.5's",
    ),
    "Glm4MoeLiteForCausalLM": Note("GLM-4.7-Flash", "DeepSeek-V3 of other sizes"),
    "YoutuForCausalLM": Note("Youtu-LLM 2B", "latent attention, dense"),
    "FlexOlmoForCausalLM": Note("FlexOlmo 7x7B", "OLMo 2 with experts"),
    "Qwen3NextForCausalLM": Note(
        "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
        "Qwen3.5 with experts, whose linear attention has its tensors fused by heads",
    ),
    "Qwen3_5ForCausalLM": Note(
        "the text model of `Qwen3_5ForConditionalGeneration` (Qwen3.5, dense)",
        "three layers in four keep a state in the place of keys and values (`linear_attention`, by "
        "the gated delta rule), the fourth has gates on what it attends to (`attention_gate`); "
        "every norm's weight is written plus one; a quarter of each head is turned",
    ),
    "Qwen3_5MoeForCausalLM": Note(
        "the text model of `Qwen3_5MoeForConditionalGeneration` (Qwen3.5-35B-A3B, 397B-A17B)",
        "Qwen3.5 with experts as Qwen2-MoE's",
    ),
    "Gemma4ForCausalLM": Note(
        "Gemma 4 (31B, 26B-A4B), and the text model of `Gemma4ForConditionalGeneration` (E2B, E4B) "
        "and `Gemma4UnifiedForConditionalGeneration`",
        "Gemma 3 whose layers differ in their heads (`layer_head_sizes`, `layer_kv_heads`), the "
        "full ones with a share of larger heads turned and, of the larger models, values that are "
        "keys; norms of values; a multiplier of each layer; of the small ones inputs of each layer "
        "(`per_layer_input_size`) and layers that read the keys of others (`kv_source_layers`); of "
        "26B-A4B experts beside the MLP, with norms of their own (`expert_layernorms`)",
    ),
    "Gemma3nForCausalLM": Note(
        "the text model of `Gemma3nForConditionalGeneration` (Gemma 3n E2B, E4B)",
        "four residual streams (`altup_num_inputs`) and one of low rank (`laurel_rank`); inputs of "
        "each layer; the last layers read the keys of others; sparse MLPs "
        "(`activation_sparsity_pattern`); norms of values; four windowed layers in five",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 4},
    ),
    "GPTNeoXForCausalLM": Note(
        "Pythia 14M to 12B, GPT-NeoX 20B, Dolly 2, RedPajama-INCITE, StableLM alpha",
        "`query_key_value` holds q, k and v of each head in turn; LayerNorm, an MLP of two linears "
        "and exact GELU (`hidden_act` gelu_erf; the 20B has the tanh form), biases everywhere; "
        "attention and MLP beside each other, each with a norm of its own "
        "(`parallel_mlp_layernorm`), or one after the other; a quarter of each head is turned",
    ),
}
# Sizes that every family takes.
_SIZES: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)


def support() -> Iterator[Support]:
    """A row for each family, in the tables' order."""
    for name, family in ARCHITECTURES.items():
        note = NOTES[name]
        keys = {"architectures": [name], **_SIZES, **note.keys}
        config = model_config(keys, "bfloat16")
        yield Support(name, note, beyond_tensorrt(config), family.for_trtllm)

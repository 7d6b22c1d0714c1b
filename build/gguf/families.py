"""What a .gguf file of each family is called in Hugging Face's words. Tables alone; reads nothing.

Source: llama.cpp's convert_hf_to_gguf.py and llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that change what a model computes and that no config.json of a family can say, with the
# values that change nothing; a family's own `keys` are none of these.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_group_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "rescale_every_n_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}


_OF_GEMMA2 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_BEHIND = {**_QK_NORMS, **_OF_GEMMA2}  # and of those that have no norm before
_TANH = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")


class Joined(NamedTuple):
    """A tensor of the model made of the file's: of several, whose rows take turns within each
    expert. turned: rows and columns of each expert have changed places.
    """

    names: tuple[str, ...]
    turned: bool = False


_GATE_UP = ("ffn_gate_exps", "ffn_up_exps")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """model_type, architecture: of its config.json. interleaves: llama.cpp's rope wants the rows of
    q and k in pairs. adds_one: norms are stored plus one. names: of tensors, beyond those that all
    have or in their stead. joined: those that are made of the file's otherwise, by their whole
    names in a layer. experts: of tensors that hold one of each expert, {} for its number.
    keys: of the config, each by the key of the file that it is of, which must be there. config:
    what the config says besides. epsilon: of its norms, in the file and in the config. window: of
    each so many layers the last sees the whole context, 0: none does; None: no layer has a window.
    partial_rope: of a head's first numbers only, perhaps. unread: keys that llama.cpp takes no
    notice of in this family.
    """

    model_type: str
    architecture: str
    interleaves: bool = False
    adds_one: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, Joined] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    window: int | None = None
    partial_rope: bool = False
    unread: tuple[str, ...] = ()


# general.architecture -> the family.
FAMILIES = {
    "llama": GgufFamily("llama", "LlamaForCausalLM", interleaves=True),
    "granite": GgufFamily(
        "granite",
        "GraniteForCausalLM",
        interleaves=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM", config={"use_sliding_window": False}),
    "qwen3": GgufFamily(
        "qwen3", "Qwen3ForCausalLM", names=_QK_NORMS, config={"use_sliding_window": False}
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        names={**_QK_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate_exps": "mlp.experts.{}.gate_proj",
            "ffn_up_exps": "mlp.experts.{}.up_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj",
        },
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        config={"use_sliding_window": False, "norm_topk_prob": True},
    ),
    "gemma": GgufFamily("gemma", "GemmaForCausalLM", adds_one=True, config=_TANH),
    "gemma2": GgufFamily(
        "gemma2",
        "Gemma2ForCausalLM",
        adds_one=True,
        names=_OF_GEMMA2,
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        config=_TANH,
        window=2,
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        "Gemma3ForCausalLM",
        adds_one=True,
        names=_NORMS_BEHIND,
        config=_TANH,
        window=6,
    ),
    "phi3": GgufFamily(
        "phi3",
        "Phi3ForCausalLM",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        window=0,
        partial_rope=True,
    ),
    "gpt-oss": GgufFamily(
        "gpt_oss",
        "GptOssForCausalLM",
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        joined={
            "self_attn.sinks": Joined(("attn_sinks.weight",)),
            "mlp.experts.gate_up_proj": Joined(tuple(f"{x}.weight" for x in _GATE_UP), True),
            "mlp.experts.gate_up_proj_bias": Joined(tuple(f"{x}.bias" for x in _GATE_UP)),
            "mlp.experts.down_proj": Joined(("ffn_down_exps.weight",), True),
            "mlp.experts.down_proj_bias": Joined(("ffn_down_exps.bias",)),
        },
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        config={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        window=2,
    ),
    "smollm3": GgufFamily("smollm3", "SmolLM3ForCausalLM", interleaves=True),
    "olmo2": GgufFamily("olmo2", "Olmo2ForCausalLM", names=_NORMS_BEHIND),
    "exaone4": GgufFamily("exaone4", "Exaone4ForCausalLM", names=_NORMS_BEHIND, window=4),
    "starcoder2": GgufFamily(
        "starcoder2",
        "Starcoder2ForCausalLM",
        names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        config={"use_bias": True, "hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
    ),
    "stablelm": GgufFamily(
        "stablelm",
        "StableLmForCausalLM",
        epsilon=_LAYER_NORM,
        partial_rope=True,
        unread=("use_parallel_residual",),  # a norm before the MLP says that it is not
    ),
    "command-r": GgufFamily(
        "cohere", "CohereForCausalLM", keys={"logit_scale": "logit_scale"}, epsilon=_LAYER_NORM
    ),
    "cohere2": GgufFamily(
        "cohere2",
        "Cohere2ForCausalLM",
        keys={"logit_scale": "logit_scale"},
        epsilon=_LAYER_NORM,
        window=4,
    ),
}
# Files of it are of llama too, with experts.
MIXTRAL = GgufFamily(
    "mixtral",
    "MixtralForCausalLM",
    interleaves=True,
    names={"ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)

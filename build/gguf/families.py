"""What a .gguf file of each family is called in Hugging Face's words. Tables alone; reads nothing.

Source: llama.cpp's convert_hf_to_gguf.py and llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """model_type, architecture: of its config.json. interleaves: llama.cpp's rope wants the rows of
    q and k in pairs. names: of tensors, beyond those that all have. keys: of the config, each by
    the key of the file that it is of, which must be there. config: what the config says besides.
    """

    model_type: str
    architecture: str
    interleaves: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


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
        "qwen3",
        "Qwen3ForCausalLM",
        names={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        config={"use_sliding_window": False},
    ),
}

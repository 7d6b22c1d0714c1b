"""Which layers of a model attend within a window, and how long that is; sizes of latent attention.

Source: transformers' configs, 4 and 5; TensorRT-LLM 1.2.1's `KvCacheConfig.max_attention_window`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from enginehouse.build.hf_keys.config_values import boolean, integer, refuse
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]


def attention_windows(hf: Hf, name: str) -> list[int]:
    """KvCacheConfig.max_attention_window: each layer's window, max_position_embeddings if whole.

    Empty when every layer sees the whole context. A checkpoint has no key for it, so it stands
    in config.json under KvCacheConfig's own name.
    """
    window, context = hf.get("sliding_window"), integer(hf, "max_position_embeddings")
    switched_off = "use_sliding_window" in hf and not boolean(hf, "use_sliding_window")
    if window is None or name not in _SLIDING or switched_off:
        return []
    window = integer(hf, "sliding_window")
    sliding = sliding_layers(hf, name)
    if window >= context or not any(sliding):
        return []
    return [window if slides else context for slides in sliding]


def sliding_layers(hf: Hf, name: str) -> list[bool]:
    """Whether each layer slides: as layer_types says, else as the family does."""
    count = integer(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        wrong = not isinstance(types, list) or any(kind not in known for kind in types)
        if wrong or len(types) != count:
            raise CheckpointError(
                f"config.json has layer_types={types!r}; wanted {count} times {' or '.join(known)}"
            )
        return [kind == known[0] for kind in types]
    return [_SLIDING[name](hf, layer) for layer in range(count)]


def _all_layers(hf: Hf, layer: int) -> bool:
    return True


def _upper_layers(hf: Hf, layer: int) -> bool:
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise CheckpointError(f"config.json has max_window_layers={first!r}; wanted a whole number")
    return boolean(hf, "use_sliding_window") and layer >= first


def _every_other(hf: Hf, layer: int) -> bool:
    return layer % 2 == 0


def _but_every_nth(hf: Hf, layer: int, usual: int = 6) -> bool:
    found = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern"))
    pattern = integer({"sliding_window_pattern": found}, "sliding_window_pattern", usual)
    return (layer + 1) % pattern != 0


def _but_every_sixth_and_the_last(hf: Hf, layer: int) -> bool:
    return (layer + 1) % 6 != 0 and layer + 1 != integer(hf, "num_hidden_layers")


def _but_each_fourth(hf: Hf, layer: int) -> bool:
    return layer % 4 != 0


def _from_window_layers(hf: Hf, layer: int) -> bool:
    return layer >= integer(hf, "max_window_layers", 62)


def _if_asked(hf: Hf, layer: int) -> bool:
    return boolean(hf, "use_sliding_window")


# Which layers slide when config.json has no layer_types.
_SLIDING: dict[str, Callable[[Hf, int], bool]] = {
    "MistralForCausalLM": _all_layers,
    "MixtralForCausalLM": _all_layers,
    "Phi3ForCausalLM": _all_layers,
    "PhiMoEForCausalLM": _all_layers,
    "Qwen2ForCausalLM": _upper_layers,
    "Qwen3ForCausalLM": _upper_layers,
    "Qwen3MoeForCausalLM": _if_asked,
    "Starcoder2ForCausalLM": _all_layers,
    "Cohere2ForCausalLM": partial(_but_every_nth, usual=4),
    "Olmo3ForCausalLM": partial(_but_every_nth, usual=4),
    "Exaone4ForCausalLM": partial(_but_every_nth, usual=4),
    "MinistralForCausalLM": _all_layers,
    "Ministral3ForCausalLM": _all_layers,
    "CwmForCausalLM": _but_each_fourth,
    "GptOssForCausalLM": _every_other,
    "Dots1ForCausalLM": _from_window_layers,
    "Gemma2ForCausalLM": _every_other,
    "Gemma3ForCausalLM": _but_every_nth,
    "Gemma3nForCausalLM": partial(_but_every_nth, usual=5),
    "Gemma4ForCausalLM": _but_every_sixth_and_the_last,
}
# DeepSeek-V3's sizes, which classes of its kin take for what config.json leaves out.
LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def latent_keys(hf: Hf) -> dict[str, Any]:
    """Sizes of latent attention under transformers' names; the scale with yarn's own factor."""
    refuse(hf, "attention_bias", (False,))
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = {name: integer(hf, name) for name in names}
    rank = integer(hf, "q_lora_rank") if hf.get("q_lora_rank") else 0
    return {
        **sizes,
        "q_lora_rank": rank,
        "rope_interleaved": hf.get("rope_interleave", True) is not False,
        "query_pre_attn_scalar": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"],
    }


def latent_sizes(hf: Hf) -> dict[str, Any]:
    """One head is kept for all, of latents and what rope turns."""
    head = integer(hf, "kv_lora_rank") + integer(hf, "qk_rope_head_dim")
    return {"num_key_value_heads": 1, "head_dim": head}

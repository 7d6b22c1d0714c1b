"""The config.json keys of families that say layer by layer what others say once: Nemotron NAS
(`DeciLMForCausalLM`), whose layers lack parts or have MLPs of several sizes, and Gemma 3n and 4,
whose layers differ in their heads, read the keys of others and have inputs of their own.

What they come to are words of our own, which runtime/config.py and checkpoint/traits.py there read.
Source: `block_configs` of nvidia/Llama-3_3-Nemotron-Super-49B-v1, and its modeling_decilm.py;
transformers' `Gemma3nTextConfig` and `Gemma4TextConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.build.hf_keys.attention_keys import sliding_layers
from enginehouse.build.hf_keys.config_values import (
    boolean,
    integer,
    json_object,
    number,
    refuse,
    whole_numbers,
)
from enginehouse.build.hf_keys.mixture_keys import read_experts
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]

_FFN_MULTIPLE = 256
# What Hugging Face's config class takes for a key that config.json leaves out.
GEMMA4: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
    },
}


GEMMA3N: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "num_kv_shared_layers": 15,
    "altup_num_inputs": 4,
    "laurel_rank": 64,
    "final_logit_softcapping": 30.0,
}


def deci_gaps(hf: Hf) -> dict[str, Any]:
    """Which layers lack attention or the MLP, and the sizes of MLPs where they differ."""
    blocks = _blocks(hf)
    no_attention = [i for i, (attention, _) in enumerate(blocks) if attention.get("no_op")]
    sizes = [_inner(hf, ffn) for _, ffn in blocks]
    gaps = {"no_attention_layers": no_attention} if no_attention else {}
    if set(sizes) != {integer(hf, "intermediate_size")}:
        gaps["layer_intermediate_sizes"] = sizes
    return gaps


def _blocks(hf: Hf) -> list[tuple[dict[str, Any], dict[str, Any]]]:
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


def _inner(hf: Hf, ffn: Mapping[str, Any]) -> int:
    if ffn.get("no_op"):
        return 0
    if ffn.get("intermediate_size") is not None:
        return integer(ffn, "intermediate_size")
    rows = int(2 * number(ffn, "ffn_mult") * integer(hf, "hidden_size") / 3)
    return -(-rows // _FFN_MULTIPLE) * _FFN_MULTIPLE


def deci_sizes(hf: Hf) -> dict[str, Any]:
    """What config.json says layer by layer and its readers want of the whole model."""
    blocks = _blocks(hf)
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
        "intermediate_size": max(_inner(hf, ffn) for _, ffn in blocks),
    }


def gemma4_sizes(hf: Hf) -> dict[str, Any]:
    """The last layer sees everything, whatever is said of it."""
    types = hf.get("layer_types")
    if not isinstance(types, list) or not types:
        return {}
    return {"layer_types": [*types[:-1], "full_attention"]}


_NORMED: dict[str, Any] = {
    "qk_layernorm": True,
    "v_layernorm": True,
    "inter_layernorms": True,
    "attention_multiplier": 1.0,
}


def gemma4_keys(hf: Hf) -> dict[str, Any]:
    refuse(hf, "attention_bias", (False,))
    refuse(hf, "use_bidirectional_attention", (None, False, "vision"))
    name = "Gemma4ForCausalLM"
    sliding, sources = sliding_layers(hf, name), _key_sources(hf, name)
    heads = [_heads(hf, layer, slides) for layer, slides in enumerate(sliding)]
    cap = "final_logit_softcapping"
    return {
        **_NORMED,
        "local_rope_layers": [i for i, slides in enumerate(sliding) if slides],
        "layer_head_sizes": [size for size, _ in heads],
        "layer_kv_heads": [count for _, count in heads],
        "shared_projection_layers": _without_values(hf, sliding),
        "layer_multipliers": True,
        **({"kv_source_layers": sources} if sources else {}),
        **(_wide_layers(hf, sources) if boolean(hf, "use_double_wide_mlp") and sources else {}),
        **_layer_inputs(hf),
        **(_mixture(hf) if boolean(hf, "enable_moe_block") else {}),
        **({cap: number(hf, cap)} if cap in hf else {}),
    }


def gemma3n_sizes(hf: Hf) -> dict[str, Any]:
    """intermediate_size may be a list."""
    sizes = whole_numbers(hf, "intermediate_size")
    count = integer(hf, "num_hidden_layers")
    if len(sizes) not in (1, count) or min(sizes) < 1:
        raise CheckpointError(
            f"config.json has {len(sizes)} of intermediate_size; wanted one number for each of "
            f"{count} layers, or one for all"
        )
    return {"intermediate_size": max(sizes), "layer_sizes": sizes * (count // len(sizes))}


def gemma3n_keys(hf: Hf) -> dict[str, Any]:
    name, sizes = "Gemma3nForCausalLM", hf["layer_sizes"]
    refuse(hf, "attention_bias", (False,))
    refuse(hf, "altup_active_idx", (0,))
    refuse(hf, "altup_correct_scale", (True,))
    sliding = sliding_layers(hf, name)
    sources = _key_sources(hf, name)
    return {
        **_NORMED,
        "local_rope_layers": [i for i, slides in enumerate(sliding) if slides],
        "shared_projection_layers": [],
        **({"kv_source_layers": sources} if sources else {}),
        **({"layer_intermediate_sizes": sizes} if len(set(sizes)) > 1 else {}),
        **_layer_inputs(hf),
        "altup_num_inputs": integer(hf, "altup_num_inputs"),
        "laurel_rank": integer(hf, "laurel_rank"),
        "activation_sparsity_pattern": _sparsities(hf),
        "final_logit_softcapping": number(hf, "final_logit_softcapping"),
    }


def _sparsities(hf: Hf) -> list[float]:
    """Of each layer the share of its MLP's gates that end; [] where none has any."""
    count = integer(hf, "num_hidden_layers")
    sparse = 10 if count > 10 else 0
    found = hf.get("activation_sparsity_pattern", [0.95] * sparse + [0.0] * (count - sparse))
    known = isinstance(found, list) and len(found) == count
    if not known or any(not isinstance(x, (int, float)) or not 0 <= x < 1 for x in found):
        raise CheckpointError(
            f"config.json has activation_sparsity_pattern={found!r}; wanted {count} numbers from 0 "
            "to below 1"
        )
    return [float(x) for x in found] if any(found) else []


def _without_values(hf: Hf, sliding: list[bool]) -> list[int]:
    """Layers whose values are their keys, before norms and rope."""
    of_keys = boolean(hf, "attention_k_eq_v")
    return [i for i, slides in enumerate(sliding) if of_keys and not slides]


def _heads(hf: Hf, layer: int, slides: bool) -> tuple[int, int]:
    """A layer's head size and number of KV heads: as `per_layer_config` says, else of layers that
    see everything as the keys with global in their names do.
    """
    usual = {key: integer(hf, key) for key in ("head_dim", "num_key_value_heads")}
    if not slides and "per_layer_config" not in hf:
        usual["head_dim"] = integer(hf, "global_head_dim")
        if boolean(hf, "attention_k_eq_v") and "num_global_key_value_heads" in hf:
            usual["num_key_value_heads"] = integer(hf, "num_global_key_value_heads")
    of_layers = {str(key): value for key, value in json_object(hf, "per_layer_config").items()}
    own = json_object(of_layers, str(layer))
    if set(own) - set(usual):
        raise CheckpointError(
            f"config.json has per_layer_config of {', '.join(sorted(own))}; wanted only "
            f"{' and '.join(usual)}"
        )
    size, count = (integer({**usual, **own}, key) for key in usual)
    if size % 2 or integer(hf, "num_attention_heads") % count:
        raise CheckpointError(
            f"config.json gives layer {layer} heads of {size} and {count} KV heads; wanted an even "
            "size, and a number that divides num_attention_heads"
        )
    return size, count


def _key_sources(hf: Hf, name: str) -> list[int]:
    """Of each layer the one whose keys and values it reads: itself, or of the last
    `num_kv_shared_layers` the last before them that is of their type. [] where all have their own.
    """
    count, sliding = integer(hf, "num_hidden_layers"), sliding_layers(hf, name)
    shared = whole_numbers(hf, "num_kv_shared_layers")[0]
    first = count - shared
    if not shared:
        return []
    last = {sliding[i]: i for i in range(max(0, first))}
    if set(last) != set(sliding):
        raise CheckpointError(
            f"config.json has num_kv_shared_layers={shared}, and no layer before them of each type "
            "of theirs; wanted one"
        )
    return [i if i < first else last[sliding[i]] for i in range(count)]


def _wide_layers(hf: Hf, sources: list[int]) -> dict[str, Any]:
    """MLPs of layers without keys have twice the columns."""
    inner = integer(hf, "intermediate_size")
    wide = [inner * (1 if source == i else 2) for i, source in enumerate(sources)]
    return {"layer_intermediate_sizes": wide}


def _layer_inputs(hf: Hf) -> dict[str, Any]:
    if not whole_numbers(hf, "hidden_size_per_layer_input")[0]:
        return {}
    return {
        "per_layer_input_size": integer(hf, "hidden_size_per_layer_input"),
        "per_layer_vocab_size": integer(hf, "vocab_size_per_layer_input"),
    }


def _mixture(hf: Hf) -> dict[str, Any]:
    """The MLP beside the experts is one that every token sees."""
    chosen = {"num_experts_per_tok": integer(hf, "top_k_experts")}
    if boolean(hf, "use_double_wide_mlp"):
        raise CheckpointError(
            "config.json has use_double_wide_mlp and enable_moe_block; wanted one of them"
        )
    return {
        "moe": read_experts({**hf, **chosen}, True, shared=integer(hf, "intermediate_size")),
        "moe_intermediate_size": integer(hf, "moe_intermediate_size"),
        "expert_layernorms": True,
    }

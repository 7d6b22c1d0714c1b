"""The config.json keys of Nemotron NAS models (`DeciLMForCausalLM`), which say layer by layer what
others say once.

Source: `block_configs` of nvidia/Llama-3_3-Nemotron-Super-49B-v1, and its modeling_decilm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.build.families.config_values import integer, json_object, number
from enginehouse.runtime.errors import CheckpointError

Hf = Mapping[str, Any]

_FFN_MULTIPLE = 256


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

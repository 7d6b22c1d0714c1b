"""The config.json of a .gguf file's model, every key written out.

What all families share stands here, and what one has beyond the tables of families.py. This file
reads no weight.
Source: llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.build.gguf.families import NEUTRAL, GgufFamily
from enginehouse.build.gguf.file import GgufFile
from enginehouse.build.gguf.rope import plain, rope_scaling
from enginehouse.runtime.errors import CheckpointError


def hf_config(file: GgufFile, family: GgufFamily) -> dict[str, Any]:
    """Hugging Face's config.json for the file, every key written out."""
    metadata, tensors = file.metadata, file.tensors

    def number(key: str, default: float | None = None) -> Any:
        value = file.of_model(key, default)
        if not isinstance(value, (int, float)) or value <= 0:
            found = "no" if value is None else f"{value!r} as"
            raise CheckpointError(
                f"{file.path} has {found} {file.key(key)}; wanted one number above 0"
            )
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    usual = None if family.partial_rope else file.of_model("rope.dimension_count")
    head_dim = number("attention.key_length", usual or hidden // heads)
    rope_dim = number("rope.dimension_count", head_dim)
    turns = rope_dim == head_dim or (family.partial_rope and rope_dim < head_dim)
    if not turns or number("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path} has rope.dimension_count={rope_dim}, attention.key_length={head_dim}; "
            "wanted them and value_length equal"
        )
    _check_neutral(file, family, head_dim, number("context_length"))
    if "token_embd.weight" not in tensors:
        raise CheckpointError(
            f"{file.path} has no tensor 'token_embd.weight'; download the file again"
        )
    tokens, rows = metadata.get("tokenizer.ggml.tokens", ()), tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, but its model's embedding ends after {rows}; "
            "give the model's Hugging Face directory, its embedding resized"
        )
    epsilon_key, epsilon = family.epsilon
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        epsilon: plain(number(epsilon_key)),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, rope_dim, number("context_length")),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
        **{word: _as_written(number(key)) for key, word in family.keys.items()},
        **family.config,
    }
    if family.partial_rope:
        config["partial_rotary_factor"] = rope_dim / head_dim
    if family.window is not None:
        config |= _windows(file, family.window)
    of_family = _OWN.get(family.model_type)
    return config if of_family is None else config | of_family(file, config)


def _as_written(number: float) -> float:
    return number if isinstance(number, int) else plain(number)


def _windows(file: GgufFile, pattern: int) -> dict[str, Any]:
    """Which layers attend within a window: as the file lists them, else all but each pattern-th."""
    window, count = file.of_model("attention.sliding_window"), file.of_model("block_count")
    if not window:
        return {"sliding_window": None}
    found = file.of_model("attention.sliding_window_pattern", pattern)
    if isinstance(found, list) and found:
        slides = [bool(found[layer % len(found)]) for layer in range(count)]
    elif isinstance(found, int):
        slides = [found == 0 or (layer + 1) % found != 0 for layer in range(count)]
    else:
        raise CheckpointError(
            f"{file.path} has {file.key('attention.sliding_window_pattern')}={found!r}; wanted a "
            "number or a list: download the file again"
        )
    types = ["sliding_attention" if each else "full_attention" for each in slides]
    return {"sliding_window": window, "layer_types": types}


# Layers of the models whose queries are scaled by hidden_size / heads and not by a head's size.
_LARGE = {"gemma2": 46, "gemma3_text": 62}


def _gemma(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """No file says how queries are scaled: llama.cpp goes by the number of layers."""
    scale = config["head_dim"]
    if config["num_hidden_layers"] == _LARGE[config["model_type"]]:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scale}


def _gemma3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    local = file.of_model("rope.freq_base_swa", 10000.0)
    return {**_gemma(file, config), "rope_local_base_freq": local}


def _phi3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    original = file.of_model("rope.scaling.original_context_length")
    return {"original_max_position_embeddings": original} if original else {}


def _smollm3(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Each fourth layer has no rope, which no file says."""
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]}


def _stablelm(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_qkv_bias": config["attention_bias"]}


def _gpt_oss(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Its yarn begins and ends between two frequencies, which no file says."""
    scaling = config["rope_scaling"]
    return {} if scaling is None else {"rope_scaling": {**scaling, "truncate": False}}


_OWN: dict[str, Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _gemma,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt_oss": _gpt_oss,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
}


def _check_neutral(file: GgufFile, family: GgufFamily, head_dim: int, context: int) -> None:
    """CheckpointError naming the first key whose value would make another model of it."""
    known = NEUTRAL | {"attention.scale": (0, head_dim**-0.5)}
    for key, values in known.items():
        found = None if key in family.keys or key in family.unread else file.of_model(key)
        if found is not None and not any(_close(found, value) for value in values):
            raise CheckpointError(
                f"{file.path} has {file.key(key)}={found!r}, which no config.json of a "
                f"{family.model_type} can say; wanted {values[-1]!r} or none: give the model's "
                "Hugging Face directory"
            )
    window = file.of_model("attention.sliding_window")
    if window and window < context and family.window is None:
        raise CheckpointError(
            f"{file.path} has {file.key('attention.sliding_window')}={window!r}, which no "
            f"{family.model_type} has; give the model's Hugging Face directory"
        )


def _close(found: Any, value: float) -> bool:
    """Whether a number of a file, which is a float32, is this one."""
    return isinstance(found, (int, float)) and math.isclose(found, value, rel_tol=1e-6)

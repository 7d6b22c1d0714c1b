"""A Hugging Face config.json in TensorRT-LLM's words.

What all families share stands here; the keys that only one family has are in family_keys.py, and
the rope in rope_config.py. This file knows no tensor.
Source: TensorRT-LLM 1.2.1 checkpoint format (`config.json`); transformers' configs, 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.build.families.architectures import architecture_of
from enginehouse.build.hf_keys.attention_keys import attention_windows
from enginehouse.build.hf_keys.config_values import REMEDY, boolean, integer, number
from enginehouse.build.hf_keys.family_keys import ACTIVATIONS, DEFAULTS, family_extra
from enginehouse.build.hf_keys.own_keys import (
    BIAS_KEYS,
    EPSILON_KEYS,
    OTHER_ACTIVATIONS,
    SIZES,
)
from enginehouse.build.hf_keys.rope_config import read_rope
from enginehouse.runtime.config import DTYPES, ModelConfig
from enginehouse.runtime.errors import CheckpointError


def model_config(hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    """A Hugging Face config in TensorRT-LLM's words, for one GPU and unquantised.

    dtype: "auto" (the checkpoint's; bfloat16 for float32) or one of DTYPES.
    Raises CheckpointError for a missing key, and for what the engine cannot run.
    """
    name = family_name(hf)
    defaults = DEFAULTS.get(name, {})
    hf = {key: value for key, value in {**defaults, **hf}.items() if value is not None}
    if hf.get("sliding_window") == 0:  # no window, as null is
        del hf["sliding_window"]
    quantised = hf.get("quantization_config")
    if isinstance(quantised, dict) and quantised:
        raise CheckpointError(
            f"config.json has quantization_config with quant_method="
            f"{quantised.get('quant_method')!r}: the checkpoint is quantised already; "
            "give the unquantised one"
        )
    if name in SIZES:
        hf = {**hf, **SIZES[name](hf)}
    heads, hidden = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    kv_heads = integer(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has num_attention_heads={heads}, which num_key_value_heads={kv_heads} "
            f"does not divide; {REMEDY}"
        )
    head_size = integer(hf, "head_dim", hidden // heads)
    if head_size % 2:
        raise CheckpointError(f"config.json gives a head size of {head_size}; wanted an even one")
    rope = read_rope(hf, name, head_size)
    windows = attention_windows(hf, name)
    attention_bias, mlp_bias = BIAS_KEYS.get(name, ("attention_bias", "mlp_bias"))
    return ModelConfig(
        architecture=name,
        dtype=_dtype(hf, dtype),
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=integer(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head_size,
        intermediate_size=integer(hf, "intermediate_size"),
        norm_epsilon=number(hf, EPSILON_KEYS.get(name, "rms_norm_eps")),
        max_position_embeddings=integer(hf, "max_position_embeddings"),
        hidden_act=_activation(hf, name),
        rotary_base=rope.base,
        rotary_scaling=rope.scaling,
        attn_bias=boolean(hf, attention_bias),
        mlp_bias=boolean(hf, mlp_bias),
        tie_word_embeddings=boolean(hf, "tie_word_embeddings"),
        extra={
            **family_extra(hf, name),
            **rope.extra,
            **({"max_attention_window": windows} if windows else {}),
        },
    )


def family_name(hf: Mapping[str, Any]) -> str:
    """TensorRT-LLM's name of the family; CheckpointError when there is none, or one unknown."""
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"config.json has no architectures; {REMEDY}")
    return architecture_of(str(names[0])).name


def _activation(hf: Mapping[str, Any], name: str) -> str:
    """TensorRT-LLM's word for an activation of the family's; CheckpointError for another."""
    (usual, *_), _ = ACTIVATIONS[name]
    found = hf.get("hidden_activation") or hf.get("hidden_act", usual)
    for words, written in (ACTIVATIONS[name], *OTHER_ACTIVATIONS.get(name, ())):
        if found in words:
            return written
    raise CheckpointError(f"config.json has hidden_act={found!r}; wanted {usual!r}")


def _dtype(hf: Mapping[str, Any], asked: str) -> str:
    if asked == "auto":
        asked = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if asked == "float32":
            return "bfloat16"
    if asked not in DTYPES:
        raise CheckpointError(f"dtype {asked!r} is not known; choose one of {', '.join(DTYPES)}")
    return asked

"""The text model of a checkpoint that holds more: Gemma 3's, with its tower for images.

config.json keeps its keys under `text_config`, of which a released one has only those that
differ from transformers' defaults, and its tensors have longer names. This file knows both and
nothing of what is made of them.
Source: transformers' Gemma3Config and Gemma3TextConfig, 4 and 5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from enginehouse.build.families.config_values import json_object
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.renamed_tensors import RenamedTensors

_WHOLE, _TEXT = "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"
# What Gemma3TextConfig takes for a key that text_config leaves out, beyond family_keys.DEFAULTS.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}
_OUTER_KEYS = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "quantization_config")
_TIE = "tie_word_embeddings"  # the whole model's, where it says so
_PREFIXES = {
    "language_model.model.": "model.",  # on the disk
    "model.language_model.": "model.",  # in transformers' memory, and by those who write it out
    "language_model.lm_head.": "lm_head.",
}


def text_part(source: SourceCheckpoint) -> SourceCheckpoint:
    """The text model as a checkpoint of its own, or `source` itself when it is nothing more.

    Raises CheckpointError when text_config is no object.
    """
    if source.config.get("architectures") != [_WHOLE]:
        return source
    outer: dict[str, Any] = {
        key: source.config[key] for key in _OUTER_KEYS if source.config.get(key) is not None
    }
    text = json_object(source.config, "text_config")
    config = {**_DEFAULTS, **outer, **text, "architectures": [_TEXT], "model_type": "gemma3_text"}
    if source.config.get(_TIE) is not None:
        config[_TIE] = source.config[_TIE]
    return replace(source, config=config, tensors=RenamedTensors(source.tensors, _text_name))


def _text_name(name: str) -> str | None:
    """The name that a tensor has when the text model is saved alone; None for other parts."""
    for long, short in _PREFIXES.items():
        if name.startswith(long):
            return short + name.removeprefix(long)
    return None

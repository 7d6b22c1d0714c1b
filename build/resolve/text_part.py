"""The text model of a checkpoint that holds more, such as a tower for images.

config.json keeps its keys under `text_config`, of which a released one has only those that differ
from transformers' defaults, or among its own (Qwen2.5-VL), and its tensors have longer names. A
text turns by one position alone, so that a rope of three (mrope) is the usual one. This file knows
those models and nothing of what is made of them.
Source: transformers' configurations of these models, 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from enginehouse.build.hf_keys.config_values import json_object
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.renamed_tensors import RenamedTensors


class _Text(NamedTuple):
    """architecture, model_type: of the text model alone. defaults: what its config takes for a key
    that is left out, beyond families' DEFAULTS.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]


_TIE = "tie_word_embeddings"  # the whole model's, where it says so
_TEXTS = {
    "Gemma3ForConditionalGeneration": _Text(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
        },
    ),
    "Mistral3ForConditionalGeneration": _Text(
        "MistralForCausalLM",
        "mistral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            _TIE: True,  # a head of its own is found beside it
        },
    ),
    "Llama4ForConditionalGeneration": _Text(
        "Llama4ForCausalLM",
        "llama4_text",
        {
            "vocab_size": 202_048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": _Text(
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "vocab_size": 152_064,
            "hidden_size": 8192,
            "intermediate_size": 29_568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    ),
    "Qwen3VLForConditionalGeneration": _Text(
        "Qwen3ForCausalLM",
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 22_016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e5,
        },
    ),
    "Qwen3_5ForConditionalGeneration": _Text(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        {
            "vocab_size": 248_320,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
        },
    ),
    "Qwen3_5MoeForConditionalGeneration": _Text(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        {
            "vocab_size": 248_320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
        },
    ),
}
_GEMMA4 = _Text(
    "Gemma4ForCausalLM",
    "gemma4_text",
    {
        "vocab_size": 262_144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
    },
)
# Of the same layers, but without inputs of each.
_UNIFIED = {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
_GEMMA4_UNIFIED = _GEMMA4._replace(defaults={**_GEMMA4.defaults, **_UNIFIED})
_GEMMA3N = _Text(
    "Gemma3nForCausalLM",
    "gemma3n_text",
    {
        "vocab_size": 262_400,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
    },
)
_TEXTS |= {
    "Gemma3nForConditionalGeneration": _GEMMA3N,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4_UNIFIED,
    "Gemma4UnifiedForCausalLM": _GEMMA4_UNIFIED,
}
# By the text model's own model_type, where a tower has several.
_OTHERS = {
    ("Mistral3ForConditionalGeneration", "ministral3"): _Text(
        "Ministral3ForCausalLM",
        "ministral3",
        {
            "vocab_size": 131_072,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
        },
    )
}
_OUTER_KEYS = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "quantization_config")
_PREFIXES = {
    "language_model.model.": "model.",  # on the disk
    "model.language_model.": "model.",  # in transformers' memory, and by those who write it out
    "language_model.lm_head.": "lm_head.",
}
_OWN = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")


def text_part(source: SourceCheckpoint) -> SourceCheckpoint:
    """The text model as a checkpoint of its own, or `source` itself when it is nothing more.

    Raises CheckpointError when text_config is no object.
    """
    names = source.config.get("architectures") or []
    found = _TEXTS.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
    if found is None:
        return source
    outer: dict[str, Any] = {
        key: source.config[key] for key in _OUTER_KEYS if source.config.get(key) is not None
    }
    text = json_object(source.config, "text_config")
    found = _OTHERS.get((str(names[0]), str(text.get("model_type"))), found)
    if not text:  # as Qwen2.5-VL was released
        outer = {key: value for key, value in source.config.items() if value is not None}
    config = {**found.defaults, **outer, **text}
    config |= {"architectures": [found.architecture], "model_type": found.model_type}
    if source.config.get(_TIE) is not None:
        config[_TIE] = source.config[_TIE]
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None:
            config[key] = _of_one_position(json_object(config, key))
    return replace(source, config=config, tensors=RenamedTensors(source.tensors, _text_name))


def _of_one_position(rope: dict[str, Any]) -> dict[str, Any]:
    """mrope's sections turn by positions that are equal in a text."""
    made = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    kinds = {key: "default" for key in ("type", "rope_type") if made.get(key) == "mrope"}
    return {**made, **kinds}


def _text_name(name: str) -> str | None:
    """The name that a tensor has when the text model is saved alone; None for other parts."""
    for long, short in _PREFIXES.items():
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name if name.startswith(_OWN) else None

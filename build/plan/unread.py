"""Tensors of a checkpoint that nothing reads: without them the engine would be another model.

What is known to do nothing is passed over; all else is refused by name, unless it is told to be
ignored. Knows names and reads no weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from enginehouse.build.families.rows import LM_HEAD
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.source import TensorSource
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

# Buffers that are computed anew, and what quantisers leave beside weights and caches, which its
# reader has looked at. `lm_head.weight` of a tied model is its embedding again.
_HARMLESS = (
    "*.rotary_emb.inv_freq",
    "*.rotary_emb.cos_cached",
    "*.rotary_emb.sin_cached",
    "*.masked_bias",
    "*.attention.bias",  # GPT-NeoX's mask
    "*.position_ids",
    "*._extra_state",
    "*.self_attn.[kvq]_scale",
    "*.self_attn.prob_scale",
    "*.self_attn.kv_scale",
    "*.self_attn.attn.[kvq]_scale",
    "*.self_attn.[kv]_proj.[kv]_scale",
    "*.self_attn.[kv]_proj.output_scale",
)
_LAYER = re.compile(r"(model|gpt_neox)\.layers\.(\d+)\.")


def check_unread(source: TensorSource, config: ModelConfig, ignored: str | None) -> None:
    """CheckpointError naming the first tensor that no row of the family reads.

    ignored: patterns of names, separated by commas, that may be left unread.
    """
    wanted = expected_shapes(config)
    patterns = [word.strip() for word in (ignored or "").split(",") if word.strip()]
    unread = sorted(name for name in source.infos if name not in wanted)
    _check_patterns(patterns, unread)
    passed = (*_HARMLESS, *patterns, *_replaced(config))
    unread = [name for name in unread if not _matches(name, passed)]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise CheckpointError(
            f"tensor {unread[0]}{more} would be read by nothing: {_why(unread[0], config)}; where "
            f"the model is whole without, pass --ignore-tensors '{_pattern(unread[0])}'"
        )


def _replaced(config: ModelConfig) -> Iterator[str]:
    """What a checkpoint may have though another tensor is in its place: a tied head, and what would
    make keys in layers that read those of another.
    """
    if config.tie_word_embeddings:
        yield LM_HEAD
    for layer in range(config.num_hidden_layers):
        if config.has_attention(layer) and not config.has_keys(layer):
            yield f"model.layers.{layer}.self_attn.[kv]_*"


def _check_patterns(patterns: Iterable[str], unread: Iterable[str]) -> None:
    """Every pattern means something: a mistyped one would hide nothing and look as if it did."""
    idle = [pattern for pattern in patterns if not any(_matches(n, [pattern]) for n in unread)]
    if idle:
        raise CheckpointError(
            f"ignore_tensors has {idle[0]!r}, which is the name of no tensor that would be left "
            "unread; leave it out"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _why(name: str, config: ModelConfig) -> str:
    """What such a tensor usually means."""
    layer = _LAYER.match(name)
    if "lora_" in name:
        return "it belongs to an adapter; merge the adapter into the model first"
    if layer and int(layer[2]) >= config.num_hidden_layers:
        return f"config.json has num_hidden_layers={config.num_hidden_layers}"
    if name.endswith(".bias"):
        return (
            "it is a bias that config.json does not announce (attention_bias, mlp_bias) or that no "
            f"{config.architecture} has"
        )
    return f"no {config.architecture} has such a part; is config.json this model's?"


def _pattern(name: str) -> str:
    """The name with its layer left open."""
    return _LAYER.sub(r"\1.layers.*.", name)

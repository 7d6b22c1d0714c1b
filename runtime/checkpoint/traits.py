"""What a family's decoder does otherwise than a Llama's, read out of config.json's words.

Pure arithmetic on a ModelConfig: no tensor, no weight name, and no family's name beyond Gemma's,
whose embedding scale stands in no key.
Source: TensorRT-LLM 1.2.1's `GemmaConfig`, `QWenConfig` and `Phi3Config`; transformers' models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

_GELU_WORDS = ("gelu", "gelu_pytorch_tanh")  # TensorRT-LLM's gelu is the tanh form too
_SILU_WORDS = ("silu", "swiglu")


class AttentionRule(NamedTuple):
    """How one layer attends: softmax(cap(q @ k * scale)) over the last `window` positions.

    window None: all of them. soft_cap None: no cap, else cap(x) = soft_cap * tanh(x / soft_cap).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """rules: one for each layer of the whole model. local_rope: whether the layer turns by the
    second rotary table (`rope_local_base_freq`). norm_sublayers: norms on what attention and MLP
    give, too, before it is added.
    """

    rules: tuple[AttentionRule, ...]
    local_rope: tuple[bool, ...]
    gelu: bool
    norm_sublayers: bool
    embedding_scale: float
    logits_soft_cap: float | None

    @property
    def windows(self) -> frozenset[int | None]:
        return frozenset(rule.window for rule in self.rules)


def traits_of(config: ModelConfig) -> Traits:
    """Raises EngineError for an activation that this runtime does not know."""
    if config.hidden_act not in _GELU_WORDS + _SILU_WORDS:
        raise EngineError(
            f"config.json has hidden_act={config.hidden_act!r}; the torch backend knows "
            + ", ".join(_SILU_WORDS + _GELU_WORDS)
        )
    extra = config.extra
    scalar = extra.get("query_pre_attn_scalar") or config.head_size
    windows = layer_windows(config)
    soft_cap = extra.get("attn_logit_softcapping")
    gemma = config.architecture.startswith("Gemma")
    return Traits(
        rules=tuple(AttentionRule(float(scalar) ** -0.5, w, soft_cap) for w in windows),
        local_rope=tuple(_is_local(config, layer) for layer in range(config.num_hidden_layers)),
        gelu=config.hidden_act in _GELU_WORDS,
        norm_sublayers=bool(extra.get("inter_layernorms", False)),
        embedding_scale=math.sqrt(config.hidden_size) if gemma else 1.0,
        logits_soft_cap=extra.get("final_logit_softcapping"),
    )


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Each layer's attention window; None where it sees its whole context.

    `max_attention_window` is KvCacheConfig's list: a window for each layer, repeated when short.
    """
    listed = config.extra.get("max_attention_window")
    if not listed:
        return [None] * config.num_hidden_layers
    windows = [int(listed[i % len(listed)]) for i in range(config.num_hidden_layers)]
    return [w if w < config.max_position_embeddings else None for w in windows]


def _is_local(config: ModelConfig, layer: int) -> bool:
    """Gemma 3: all layers but every n-th turn by the local base."""
    pattern = int(config.extra.get("_sliding_window_pattern") or 0)
    return pattern > 0 and (layer + 1) % pattern != 0

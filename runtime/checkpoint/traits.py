"""What a family's decoder does otherwise than a Llama's, read out of config.json's words.

Pure arithmetic on a ModelConfig: no tensor, no weight name, and no family's name beyond Gemma's,
whose embedding scale stands in no key. docs/families.md has each trait and its key.
Source: TensorRT-LLM 1.2.1's `GemmaConfig`, `QWenConfig` and `Phi3Config`; transformers' models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

_GELU_WORDS = ("gelu", "gelu_pytorch_tanh")  # TensorRT-LLM's gelu is the tanh form too
_ACTIVATIONS = {
    "silu": "silu",
    "swiglu": "silu",
    **dict.fromkeys(_GELU_WORDS, "gelu"),
    "squared-relu": "relu2",
}


class AttentionRule(NamedTuple):
    """How one layer attends: softmax(cap(q @ k * scale)) over the last `window` positions.

    window None: all of them. soft_cap None: no cap, else cap(x) = soft_cap * tanh(x / soft_cap).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """rules: one for each layer of the whole model. ropes: the rotary table that turns each layer,
    0, or 1 for the local one (`rope_local_base_freq`); None: nothing is turned. rope_interleaved:
    neighbours are turned as pairs, else an element of each half. activation: silu, gelu (its tanh
    form) or relu2. parallel: the MLP reads what attention does, by the same norm, and both are
    added to it. layer_norm: norms take the mean off first, and may have biases. norm_sublayers:
    norms on what attention and MLP give, before it is added; norm_inputs: on what enters them.
    norm_all_heads: the norms on q and k are over all heads together, else each head's own.
    residual_scale: of what attention and MLP give, as it is added. logits_scale: of the logits,
    before they are capped.
    """

    rules: tuple[AttentionRule, ...]
    ropes: tuple[int | None, ...]
    rope_interleaved: bool
    activation: str
    gated_mlp: bool
    parallel: bool
    layer_norm: bool
    norm_inputs: bool
    norm_sublayers: bool
    norm_all_heads: bool
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_soft_cap: float | None

    @property
    def windows(self) -> frozenset[int | None]:
        return frozenset(rule.window for rule in self.rules)


def traits_of(config: ModelConfig) -> Traits:
    """Raises EngineError for an activation that this runtime does not know."""
    if config.hidden_act not in _ACTIVATIONS:
        raise EngineError(
            f"config.json has hidden_act={config.hidden_act!r}; the torch backend knows "
            + ", ".join(_ACTIVATIONS)
        )
    extra = config.extra
    scalar = float(extra.get("query_pre_attn_scalar") or config.head_size)
    scale = float(extra.get("attention_multiplier") or scalar**-0.5)
    windows = layer_windows(config)
    soft_cap = extra.get("attn_logit_softcapping")
    gemma = config.architecture.startswith("Gemma")
    return Traits(
        rules=tuple(AttentionRule(scale, window, soft_cap) for window in windows),
        ropes=tuple(_rope(config, layer) for layer in range(config.num_hidden_layers)),
        rope_interleaved=bool(extra.get("rope_interleaved", False)),
        activation=_ACTIVATIONS[config.hidden_act],
        gated_mlp=config.gated_mlp,
        parallel=bool(extra.get("parallel_sublayers", False)),
        layer_norm=config.layer_norm,
        norm_inputs=bool(extra.get("input_layernorms", True)),
        norm_sublayers=bool(extra.get("inter_layernorms", False)),
        norm_all_heads=bool(extra.get("qk_layernorm_all_heads", False)),
        embedding_scale=float(
            extra.get("embedding_multiplier") or (math.sqrt(config.hidden_size) if gemma else 1.0)
        ),
        residual_scale=float(extra.get("residual_multiplier") or 1.0),
        logits_scale=1.0 / float(extra.get("logits_scaling") or 1.0),
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


def _rope(config: ModelConfig, layer: int) -> int | None:
    """Gemma 3: all layers but every n-th turn by the local base; others list theirs."""
    extra = config.extra
    if layer in extra.get("no_rope_layers", ()):
        return None
    pattern = int(extra.get("_sliding_window_pattern") or 0)
    is_local = pattern > 0 and (layer + 1) % pattern != 0
    return int(is_local or layer in extra.get("local_rope_layers", ()))


# Of `Traits`, what TensorRT engines know but one value of, and how a refusal calls another.
_ALWAYS: dict[str, tuple[object, str]] = {}


def beyond_tensorrt(config: ModelConfig) -> str | None:
    """The first trait of a model that TensorRT engines of it do not have; None: they have all."""
    traits = traits_of(config)
    for name, (always, words) in _ALWAYS.items():
        if getattr(traits, name) != always:
            return words
    return None

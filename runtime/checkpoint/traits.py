"""What a family's decoder does otherwise than a Llama's, read out of config.json's words.

Pure arithmetic on a ModelConfig: no tensor, no weight name, and no family's name beyond Gemma's,
whose embedding scale stands in no key. docs/families.md has each trait and its key.
Source: TensorRT-LLM 1.2.1's `GemmaConfig`, `QWenConfig` and `Phi3Config`; transformers' models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

_GELU_WORDS = ("gelu", "gelu_pytorch_tanh")  # TensorRT-LLM's gelu is the tanh form too
_ACTIVATIONS = {
    "silu": "silu",
    "swiglu": "silu",
    **dict.fromkeys(_GELU_WORDS, "gelu"),
    "gelu_erf": "gelu_erf",
    "geglu": "gelu",
    "squared-relu": "relu2",
}


class Chunked(NamedTuple):
    """What a position sees in the place of a window: those before it in its own `size` of them."""

    size: int


class AttentionRule(NamedTuple):
    """How one layer attends: softmax(cap(q @ k * scale)) over the last `window` positions.

    window None: all of them. soft_cap None: no cap, else cap(x) = soft_cap * tanh(x / soft_cap).
    sinks: whoever holds a layer's weights sets them, a score for each head that the softmax sees
    and nothing is read at, [heads]; None for none.
    """

    scale: float
    window: int | Chunked | None = None
    soft_cap: float | None = None
    sinks: Any = None


@dataclass(frozen=True, slots=True)
class Traits:
    """rules: one for each layer of the whole model. ropes: the rotary table that turns each layer,
    0, or 1 for the local one (`rope_local_base_freq`); None: nothing is turned. rope_interleaved:
    neighbours are turned as pairs, else an element of each half. norm_turned_heads: the norms on q
    and k come after rope, else before; l2_norm_heads: turned heads have norms without weights.
    query_growth: beta, a length and the first position: queries are multiplied by 1 + beta *
    ln(1 + (position + first) // length), in turned layers, or grows_unturned, in the others.
    clip_qkv: what q, k and v are bounded to, on either side.
    activation: silu, gelu (its tanh form), gelu_erf (the exact one) or relu2; with swiglu_limit
    gate * sigmoid(alpha * gate) * (up + 1), of gates up to the limit and ups within it. parallel:
    the MLP reads what attention does, by the same norm, or by one of its own (parallel_norm), and
    both are added to it. layer_norm: norms take the mean off first, and
    may have biases. norm_weights: norms multiply by weights. norm_sublayers:
    norms on what attention and MLP give, before it is added; norm_inputs: on what enters them.
    norm_all_heads: the norms on q and k are over all heads together, else each head's own.
    residual_scale: of what attention and MLP give, as it is added. logits_scale: of the logits,
    before they are capped. head_bias: lm_head has one. gated_attention: what a head
    gives is multiplied by the sigmoid of its gate. linear: some layers have linear attention
    (`ModelConfig.delta`). norm_values: values have norms without weights. several_heads:
    layers differ in their heads' size and number (`ModelConfig.of_layer`). shared_keys: layers read
    others' keys and values (`ModelConfig.kv_layer`). layer_inputs: each layer gets something of a
    token besides (`ModelConfig.per_layer_size`). layer_scales: what a layer gives is multiplied by
    a number of its own. norm_experts: the shared expert and the others have norms of their own
    before and behind them, and experts are chosen by what enters both. streams: hidden states that
    go from layer to layer. learned_residual: to what attention gives a residual of low rank is
    added. cutoffs: of each layer, where its MLP's gates end, in standard deviations above their
    mean; () where all are whole.
    """

    rules: tuple[AttentionRule, ...]
    ropes: tuple[int | None, ...]
    rope_interleaved: bool
    norm_turned_heads: bool
    l2_norm_heads: bool
    query_growth: tuple[float, int, int] | None
    grows_unturned: bool
    clip_qkv: float | None
    activation: str
    swiglu_limit: float | None
    swiglu_alpha: float
    gated_mlp: bool
    parallel: bool
    parallel_norm: bool
    layer_norm: bool
    norm_weights: bool
    norm_inputs: bool
    norm_sublayers: bool
    norm_all_heads: bool
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_soft_cap: float | None
    head_bias: bool
    gated_attention: bool
    linear: bool
    norm_values: bool
    several_heads: bool
    shared_keys: bool
    layer_inputs: bool
    layer_scales: bool
    norm_experts: bool
    streams: int
    learned_residual: bool
    cutoffs: tuple[float | None, ...]

    @property
    def windows(self) -> frozenset[int | Chunked | None]:
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
    if config.latent is not None:
        scale *= _latent_scale(config)
    windows = layer_windows(config)
    soft_cap = extra.get("attn_logit_softcapping")
    gemma = config.architecture.startswith("Gemma")
    return Traits(
        rules=tuple(AttentionRule(scale, window, soft_cap) for window in windows),
        ropes=tuple(_rope(config, layer) for layer in range(config.num_hidden_layers)),
        rope_interleaved=bool(extra.get("rope_interleaved", False)),
        norm_turned_heads=bool(extra.get("qk_layernorm_after_rope", False)),
        l2_norm_heads=bool(extra.get("qk_l2norm", False)),
        query_growth=_query_growth(config),
        grows_unturned="attn_scale" in extra,
        clip_qkv=extra.get("clip_qkv"),
        activation=_ACTIVATIONS[config.hidden_act],
        swiglu_limit=extra.get("swiglu_limit"),
        swiglu_alpha=float(extra.get("swiglu_alpha", 1.0)),
        gated_mlp=config.gated_mlp,
        parallel=bool(extra.get("parallel_sublayers", False)),
        parallel_norm=bool(extra.get("parallel_mlp_layernorm", False)),
        layer_norm=config.layer_norm,
        norm_weights=bool(extra.get("norm_weights", True)),
        norm_inputs=bool(extra.get("input_layernorms", True)),
        norm_sublayers=bool(extra.get("inter_layernorms", False)),
        norm_all_heads=bool(extra.get("qk_layernorm_all_heads", False)),
        embedding_scale=float(
            extra.get("embedding_multiplier") or (math.sqrt(config.hidden_size) if gemma else 1.0)
        ),
        residual_scale=float(extra.get("residual_multiplier") or 1.0),
        logits_scale=1.0 / float(extra.get("logits_scaling") or 1.0),
        logits_soft_cap=extra.get("final_logit_softcapping"),
        head_bias=bool(extra.get("lm_head_bias", False)),
        gated_attention=config.query_size > config.head_size,
        linear=config.delta is not None,
        norm_values=bool(extra.get("v_layernorm", False)),
        several_heads="layer_head_sizes" in extra,
        shared_keys="kv_source_layers" in extra,
        layer_inputs=config.per_layer_size > 0,
        layer_scales=bool(extra.get("layer_multipliers", False)),
        norm_experts=bool(extra.get("expert_layernorms", False)),
        streams=config.num_streams,
        learned_residual=bool(extra.get("laurel_rank")),
        cutoffs=tuple(_cutoff(share) for share in extra.get("activation_sparsity_pattern", ())),
    )


def layer_windows(config: ModelConfig) -> list[int | Chunked | None]:
    """Each layer's attention window; None where it sees its whole context.

    `max_attention_window` is KvCacheConfig's list: a window for each layer, repeated when short.
    """
    listed, size = (
        config.extra.get("max_attention_window"),
        config.extra.get("attention_chunk_size"),
    )
    if size and size < config.max_position_embeddings:
        chunked = config.extra["chunked_layers"]
        return [Chunked(size) if i in chunked else None for i in range(config.num_hidden_layers)]
    if not listed:
        return [None] * config.num_hidden_layers
    windows = [int(listed[i % len(listed)]) for i in range(config.num_hidden_layers)]
    return [w if w < config.max_position_embeddings else None for w in windows]


def _cutoff(sparsity: float) -> float | None:
    """Where a normal distribution has this share below."""
    return NormalDist().inv_cdf(sparsity) if sparsity > 0 else None


def _latent_scale(config: ModelConfig) -> float:
    """DeepSeek's: what yarn stretches is made up for in the scores, twice."""
    scaling = config.rotary_scaling or {}
    whole, factor = scaling.get("mscale_all_dim"), float(scaling.get("factor", 1.0))
    if not whole or factor <= 1:
        return 1.0
    return float((0.1 * float(whole) * math.log(factor) + 1.0) ** 2)


def _query_growth(config: ModelConfig) -> tuple[float, int, int] | None:
    """Ministral 3 keeps it with its rope's scaling, and counts from 0."""
    if "attn_scale" in config.extra:
        return float(config.extra["attn_scale"]), int(config.extra["floor_scale"]), 1
    scaling = config.rotary_scaling or {}
    beta = scaling.get("llama_4_scaling_beta")
    return (float(beta), int(scaling["original_max_position_embeddings"]), 0) if beta else None


def _rope(config: ModelConfig, layer: int) -> int | None:
    """Gemma 3: all layers but every n-th turn by the local base; others list theirs."""
    extra = config.extra
    if layer in extra.get("no_rope_layers", ()):
        return None
    pattern = int(extra.get("_sliding_window_pattern") or 0)
    is_local = pattern > 0 and (layer + 1) % pattern != 0
    return int(is_local or layer in extra.get("local_rope_layers", ()))


# Of `Traits`, what TensorRT engines know but one value of, and how a refusal calls another.
_ALWAYS: dict[str, tuple[object, str]] = {
    "several_heads": (False, "heads of several sizes"),
    "shared_keys": (False, "layers that read the keys of others"),
    "layer_inputs": (False, "inputs of each layer"),
    "layer_scales": (False, "a multiplier of each layer"),
    "norm_values": (False, "norms of values"),
    "norm_experts": (False, "experts with norms of their own"),
    "streams": (1, "several residual streams"),
    "learned_residual": (False, "a learned residual"),
    "cutoffs": ((), "sparse MLPs"),
    "linear": (False, "linear attention"),
    "gated_attention": (False, "gated attention"),
}


def beyond_tensorrt(config: ModelConfig) -> str | None:
    """The first trait of a model that TensorRT engines of it do not have; None: they have all."""
    traits = traits_of(config)
    others = (words for name, (known, words) in _ALWAYS.items() if getattr(traits, name) != known)
    return next(others, None)

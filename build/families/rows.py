"""The rows of families' tables: which Hugging Face tensors make one TensorRT-LLM tensor, and the
groups of rows (an attention, an MLP, norms) that families share.

Knows names alone; which family has which is architectures.py's.
Source: TensorRT-LLM 1.2.1 checkpoint format (tensor names); transformers' models, 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from enginehouse.runtime.config import ModelConfig

# What is done to the sources once they are concatenated along dim 0 (`units.read_row`): split into
# as many experts; halves exchanged; one added; of one dimension; and GPT-OSS's stacks of experts
# [E, in, out] turned, gate and up, which take turns there, parted, up first; or Llama 4's, in which
# up follows gate; or stacks [E, out, in], as they are or their halves exchanged; q, k and v, where
# each head's follow each other, parted; the parts of linear attention put together head by head;
# and a router's weight times a factor of its inputs.
Recipe = Literal[
    "join",
    "parted_heads",
    "stacked",
    "stacked_halves",
    "router",
    "experts",
    "swap_halves",
    "plus_one",
    "flat",
    "turned_experts",
    "turned_pairs",
    "turned_halves",
    "pairs",
    "qkvz_by_heads",
    "qkv_by_heads",
    "ba_by_heads",
]
STACKS = ("turned", "stacked")  # recipes of one tensor that holds all experts begin so
When = Callable[[ModelConfig, int], bool]


def always(config: ModelConfig, layer: int) -> bool:
    return True


class TensorRow(NamedTuple):
    """One TensorRT-LLM tensor: `sources` concatenated along dim 0. `{}` is the global layer."""

    target: str
    sources: tuple[str, ...]
    optional: bool = False  # left out when none of its sources exists
    recipe: Recipe = "join"
    when: When = always  # of which layers


def only(when: When, rows: Iterable[TensorRow]) -> tuple[TensorRow, ...]:
    """The rows in those layers alone, of which `when` is true."""
    return tuple(row._replace(when=when) for row in rows)


EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
TARGET, SOURCE = "transformer.layers.{}.", "model.layers.{}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def row(target: str, *sources: str, recipe: Recipe = "join") -> TensorRow:
    """A layer's weight."""
    names = tuple(f"{SOURCE}{source}.weight" for source in sources)
    return TensorRow(f"{TARGET}{target}.weight", names, recipe=recipe)


def exact(target: str, source: str, recipe: Recipe = "join") -> TensorRow:
    """A layer's tensor, both names in full."""
    return TensorRow(f"{TARGET}{target}", (f"{SOURCE}{source}",), recipe=recipe)


def linear(target: str, *sources: str, recipe: Recipe = "join") -> tuple[TensorRow, ...]:
    """A linear's weight, and its bias where the model has one."""
    names = tuple(f"{SOURCE}{source}.bias" for source in sources)
    bias = TensorRow(f"{TARGET}{target}.bias", names, optional=True, recipe=recipe)
    return row(target, *sources, recipe=recipe), bias


def norms(recipe: Recipe, **sources: str) -> tuple[TensorRow, ...]:
    return tuple(row(target, source, recipe=recipe) for target, source in sources.items())


def norm_biases(**sources: str) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(f"{TARGET}{target}.bias", (f"{SOURCE}{source}.bias",))
        for target, source in sources.items()
    )


LLAMA_ATTENTION = (
    *linear("attention.qkv", *_QKV),
    *linear("attention.dense", "self_attn.o_proj"),
)
# Qwen2 has a bias on q, k, v and none on o; the families below have none.
QWEN2_ATTENTION = (*linear("attention.qkv", *_QKV), row("attention.dense", "self_attn.o_proj"))
PLAIN_ATTENTION = (row("attention.qkv", *_QKV), row("attention.dense", "self_attn.o_proj"))
PHI3_ATTENTION = (
    row("attention.qkv", "self_attn.qkv_proj"),  # q, k, v rows in this order already
    row("attention.dense", "self_attn.o_proj"),
)
NEOX_ATTENTION = (
    *linear("attention.qkv", "attention.query_key_value", recipe="parted_heads"),
    *linear("attention.dense", "attention.dense"),
)
PHI_ATTENTION = (*linear("attention.qkv", *_QKV), *linear("attention.dense", "self_attn.dense"))


def qk_norms(
    recipe: Recipe = "join", q: str = "self_attn.q_norm", k: str = "self_attn.k_norm"
) -> tuple[TensorRow, ...]:
    return (
        row("attention.q_layernorm", q, recipe=recipe),
        row("attention.k_layernorm", k, recipe=recipe),
    )


QWEN3_ATTENTION = (*PLAIN_ATTENTION, *qk_norms())
GEMMA3_ATTENTION = (*PLAIN_ATTENTION, *qk_norms("plus_one"))
HUNYUAN_ATTENTION = (
    *LLAMA_ATTENTION,
    *qk_norms(q="self_attn.query_layernorm", k="self_attn.key_layernorm"),
)
GPT_OSS_ATTENTION = (*LLAMA_ATTENTION, exact("attention.sinks", "self_attn.sinks"))


# Through latents; the queries' are compressed too where a model has a rank for them.
LATENT_ATTENTION = (
    *only(
        lambda config, layer: bool(config.extra["q_lora_rank"]),
        (
            row("attention.q_a", "self_attn.q_a_proj"),
            row("attention.q_a_layernorm", "self_attn.q_a_layernorm"),
            row("attention.q_b", "self_attn.q_b_proj"),
        ),
    ),
    *only(
        lambda config, layer: not config.extra["q_lora_rank"],
        (row("attention.q", "self_attn.q_proj"),),
    ),
    row("attention.kv_a", "self_attn.kv_a_proj_with_mqa"),
    row("attention.kv_a_layernorm", "self_attn.kv_a_layernorm"),
    row("attention.kv_b", "self_attn.kv_b_proj"),
    row("attention.dense", "self_attn.o_proj"),
)


# Three layers in four keep a state, and the fourth keys and values.
_DELTA = (
    exact("linear_attention.conv1d.weight", "linear_attn.conv1d.weight", "qkv_by_heads"),
    exact("linear_attention.dt_bias", "linear_attn.dt_bias"),
    exact("linear_attention.A_log", "linear_attn.A_log"),
    row("linear_attention.layernorm", "linear_attn.norm"),
    row("linear_attention.dense", "linear_attn.out_proj"),
)
QWEN3_NEXT_ATTENTION = (
    *only(ModelConfig.has_attention, GEMMA3_ATTENTION),
    *only(
        ModelConfig.is_linear,
        (
            row("linear_attention.in_qkvz", "linear_attn.in_proj_qkvz"),
            row("linear_attention.in_ba", "linear_attn.in_proj_ba"),
            *_DELTA,
        ),
    ),
)
QWEN3_5_ATTENTION = (
    *only(ModelConfig.has_attention, GEMMA3_ATTENTION),
    *only(
        ModelConfig.is_linear,
        (
            row(
                "linear_attention.in_qkvz",
                "linear_attn.in_proj_qkv",
                "linear_attn.in_proj_z",
                recipe="qkvz_by_heads",
            ),
            row(
                "linear_attention.in_ba",
                "linear_attn.in_proj_b",
                "linear_attn.in_proj_a",
                recipe="ba_by_heads",
            ),
            *_DELTA,
        ),
    ),
)


def _has_own_keys(config: ModelConfig, layer: int) -> bool:
    return config.has_keys(layer)


def _reads_others(config: ModelConfig, layer: int) -> bool:
    return not config.has_keys(layer)


def _has_values(config: ModelConfig, layer: int) -> bool:
    return config.has_keys(layer) and layer not in config.extra["shared_projection_layers"]


def _values_are_keys(config: ModelConfig, layer: int) -> bool:
    return config.has_keys(layer) and layer in config.extra["shared_projection_layers"]


# Of layers that make no values but of their keys, that is what v is; others make neither.
GEMMA4_ATTENTION = (
    *only(_has_values, (row("attention.qkv", *_QKV),)),
    *only(_values_are_keys, (row("attention.qkv", _QKV[0], _QKV[1], _QKV[1]),)),
    *only(_reads_others, (row("attention.q", _QKV[0]),)),
    row("attention.dense", "self_attn.o_proj"),
    row("attention.q_layernorm", "self_attn.q_norm"),
    *only(_has_own_keys, (row("attention.k_layernorm", "self_attn.k_norm"),)),
)
# What enters a layer besides, and what all it gives is multiplied by.
LAYER_INPUTS = only(
    lambda config, layer: config.per_layer_size > 0,
    (
        row("per_layer_gate", "per_layer_input_gate"),
        row("per_layer_proj", "per_layer_projection"),
        row("per_layer_layernorm", "post_per_layer_input_norm"),
    ),
)
# Several residual streams, and one of low rank.
STREAMS = (
    *norms(
        "join", stream_layernorm="altup.router_norm", laurel_layernorm="laurel.post_laurel_norm"
    ),
    row("stream_router", "altup.modality_router"),
    row("stream_predictions", "altup.prediction_coefs"),
    row("stream_corrections", "altup.correction_coefs"),
    exact("stream.correct_output_scale", "altup.correct_output_scale"),
    row("laurel_left", "laurel.linear_left"),
    row("laurel_right", "laurel.linear_right"),
)
INPUT_TABLES = only(
    lambda config, layer: config.per_layer_size > 0,
    (
        TensorRow(f"transformer.per_layer_{target}.weight", (f"model.{source}.weight",))
        for target, source in (
            ("embedding", "embed_tokens_per_layer"),
            ("projection", "per_layer_model_projection"),
            ("layernorm", "per_layer_projection_norm"),
        )
    ),
)
LAYER_SCALE = (exact("layer.layer_scalar", "layer_scalar"),)


LLAMA_MLP = (
    *linear("mlp.fc", "mlp.gate_proj"),  # act(fc(x)) * gate(x): fc is Hugging Face's gate
    *linear("mlp.proj", "mlp.down_proj"),
    *linear("mlp.gate", "mlp.up_proj"),
)
PLAIN_MLP = tuple(row for row in LLAMA_MLP if not row.optional)
PHI3_MLP = (
    row("mlp.fc", "mlp.gate_up_proj", recipe="swap_halves"),  # up first, then gate
    row("mlp.proj", "mlp.down_proj"),
)
GRANITE_HYBRID_MLP = (
    row("mlp.fc", "shared_mlp.input_linear", recipe="swap_halves"),
    row("mlp.proj", "shared_mlp.output_linear"),
)
# act(fc(x)), and no gate
UNGATED_MLP = (*linear("mlp.fc", "mlp.up_proj"), *linear("mlp.proj", "mlp.down_proj"))
STARCODER2_MLP = (*linear("mlp.fc", "mlp.c_fc"), *linear("mlp.proj", "mlp.c_proj"))
NEOX_MLP = (*linear("mlp.fc", "mlp.dense_h_to_4h"), *linear("mlp.proj", "mlp.dense_4h_to_h"))
PHI_MLP = (*linear("mlp.fc", "mlp.fc1"), *linear("mlp.proj", "mlp.fc2"))

LLAMA_NORMS = dict(input_layernorm="input_layernorm", post_layernorm="post_attention_layernorm")
ONE_NORM = dict(input_layernorm="input_layernorm")
NORMS_BEHIND = dict(
    post_layernorm="post_attention_layernorm",
    post_feedforward_layernorm="post_feedforward_layernorm",
)
GEMMA2_NORMS = dict(
    LLAMA_NORMS,
    pre_feedforward_layernorm="pre_feedforward_layernorm",
    post_feedforward_layernorm="post_feedforward_layernorm",
)
GLM4_NORMS = dict(
    input_layernorm="input_layernorm",
    post_layernorm="post_self_attn_layernorm",
    pre_feedforward_layernorm="post_attention_layernorm",
    post_feedforward_layernorm="post_mlp_layernorm",
)

"""The whole shape of every Hugging Face tensor that a conversion reads, and whether it is there.

Source: transformers' models, 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.rows import LM_HEAD
from enginehouse.build.source import TensorSource
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

Shape = tuple[int, ...]


def head_norm_size(config: ModelConfig, module: str) -> int:
    """Numbers of a norm on queries or keys; 0 of another norm. One over all heads is whole on each
    rank, as what it divides by is.
    """
    heads = {
        "attention.q_layernorm": config.num_attention_heads,
        "attention.k_layernorm": config.num_key_value_heads,
    }.get(module, 0)
    if config.delta is not None and module == "linear_attention.layernorm":
        return config.delta.value_size
    if config.latent is not None:
        ranks = {"attention.q_a_layernorm": config.latent.query_rank}
        return {**ranks, "attention.kv_a_layernorm": config.latent.rank}.get(module, 0)
    over_all = config.extra.get("qk_layernorm_all_heads", False)
    return config.head_size * (heads if over_all else min(heads, 1))


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _inner(config: ModelConfig, name: str) -> int:
    """Rows of the gate that a tensor of an MLP, of an expert or of a shared one belongs to."""
    if ".experts." in name:
        return config.moe_intermediate_size
    if ".shared_" in name and config.num_experts:
        return config.shared_expert_size
    return config.inner_size(_layer(name))


def _vocabulary(config: ModelConfig, name: str) -> Shape:
    return config.vocab_size, config.hidden_size


def _queries(config: ModelConfig, name: str) -> Shape:
    latent, heads = config.latent, config.num_attention_heads
    if latent is None:
        return heads * config.query_size, config.hidden_size
    entering = latent.query_rank if ".q_b_proj." in name else config.hidden_size
    return heads * (latent.nope + latent.rope), entering


def _latents(config: ModelConfig, name: str) -> Shape:
    """What makes latents of the hidden state, and of these keys and values."""
    latent, heads = config.latent, config.num_attention_heads
    assert latent is not None
    return {
        "q_a_proj": (latent.query_rank, config.hidden_size),
        "kv_a_proj_with_mqa": (latent.rank + latent.rope, config.hidden_size),
        "kv_b_proj": (heads * (latent.nope + latent.value), latent.rank),
    }[name.split(".")[-2]]


def _latent_norm(config: ModelConfig, name: str) -> Shape:
    return (head_norm_size(config, f"attention.{name.split('.')[-2]}"),)


def _keys(config: ModelConfig, name: str) -> Shape:
    return config.num_key_value_heads * config.head_size, config.hidden_size


def _attended(config: ModelConfig, name: str) -> Shape:
    return config.hidden_size, config.attended_size


def _up(config: ModelConfig, name: str) -> Shape:
    return _inner(config, name), config.hidden_size


def _both(config: ModelConfig, name: str) -> Shape:
    return 2 * _inner(config, name), config.hidden_size


def _down(config: ModelConfig, name: str) -> Shape:
    return config.hidden_size, _inner(config, name)


def _query_norm(config: ModelConfig, name: str) -> Shape:
    return (head_norm_size(config, "attention.q_layernorm"),)


def _key_norm(config: ModelConfig, name: str) -> Shape:
    return (head_norm_size(config, "attention.k_layernorm"),)


def _router(config: ModelConfig, name: str) -> Shape:
    return config.num_experts, config.hidden_size


def _delta(config: ModelConfig, name: str) -> Shape:
    """Of linear attention: what makes queries, keys, values and gates, and what reads them."""
    delta, hidden = config.delta, config.hidden_size
    assert delta is not None
    values, mixed = delta.key_heads * delta.values, delta.key_heads * delta.mixed
    return {
        "in_proj_qkvz": (mixed + values, hidden),
        "in_proj_qkv": (mixed, hidden),
        "in_proj_z": (values, hidden),
        "in_proj_ba": (2 * delta.value_heads, hidden),
        "in_proj_b": (delta.value_heads, hidden),
        "in_proj_a": (delta.value_heads, hidden),
        "conv1d": (mixed, 1, delta.kernel),
        "out_proj": (hidden, values),
    }[name.split(".")[-2]]


def _norm(config: ModelConfig, name: str) -> Shape:
    if ".linear_attn." in name:
        return (head_norm_size(config, "linear_attention.layernorm"),)
    return (config.hidden_size,)


def _of_value_heads(config: ModelConfig, name: str) -> Shape:
    assert config.delta is not None
    return (config.delta.value_heads,)


_DELTA = (
    *("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "in_proj_ba", "in_proj_b", "in_proj_a"),
    *("conv1d", "out_proj"),
)


def _turned(name: str, rows: int, columns: int) -> Shape:
    """A stack's expert: outputs by inputs, but in MLPs of those that have them turned."""
    in_mlp = ".mlp." in name or ".feed_forward." in name
    return (columns, rows) if in_mlp else (rows, columns)


_Of = Callable[[ModelConfig, str], Shape]
# By the last word of a module's name: the shape of its weight, whose rows are its bias's.
_SHAPES: dict[str, _Of] = {
    **dict.fromkeys(("embed_tokens", "embed_in", "lm_head", "embed_out"), _vocabulary),
    **dict.fromkeys(("q_proj", "q_b_proj"), _queries),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"), _latents),
    **dict.fromkeys(("q_a_layernorm", "kv_a_layernorm"), _latent_norm),
    **dict.fromkeys(("k_proj", "v_proj"), _keys),
    **dict.fromkeys(("qkv_proj", "query_key_value"), lambda c, name: (c.qkv_size, c.hidden_size)),
    **dict.fromkeys(("o_proj", "dense"), _attended),
    **dict.fromkeys(("gate_proj", "up_proj", "c_fc", "fc1", "w1", "w3", "dense_h_to_4h"), _up),
    **dict.fromkeys(("gate_up_proj", "input_linear"), _both),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "w2", "output_linear", "dense_4h_to_h"), _down),
    **dict.fromkeys(("gate", "wg", "router"), _router),
    "shared_expert_gate": lambda config, name: (1, config.hidden_size),
    **dict.fromkeys(("q_norm", "query_layernorm"), _query_norm),
    **dict.fromkeys(("k_norm", "key_layernorm"), _key_norm),
    **dict.fromkeys(_DELTA, _delta),
    "norm": _norm,
    "embed_tokens_per_layer": lambda config, name: (
        int(config.extra["per_layer_vocab_size"]),
        config.num_hidden_layers * config.per_layer_size,
    ),
    "per_layer_model_projection": lambda config, name: (
        config.num_hidden_layers * config.per_layer_size,
        config.hidden_size,
    ),
    "per_layer_projection_norm": lambda config, name: (config.per_layer_size,),
    "per_layer_input_gate": lambda config, name: (config.per_layer_size, config.hidden_size),
    "per_layer_projection": lambda config, name: (config.hidden_size, config.per_layer_size),
    "proj": _router,
    "linear_left": lambda config, name: (int(config.extra["laurel_rank"]), config.hidden_size),
    "linear_right": lambda config, name: (config.hidden_size, int(config.extra["laurel_rank"])),
    "modality_router": lambda config, name: (config.num_streams, config.hidden_size),
    "prediction_coefs": lambda config, name: (config.num_streams**2, config.num_streams),
    "correction_coefs": lambda config, name: (config.num_streams, config.num_streams),
}
# By the last word of a tensor's name, where it is no module's weight or bias.
_TENSORS: dict[str, _Of] = {
    **dict.fromkeys(("A_log", "dt_bias"), _of_value_heads),
    "sinks": lambda config, name: (config.num_attention_heads,),
    "e_score_correction_bias": lambda config, name: (
        (1, config.num_experts) if "moe_statics" in name else (config.num_experts,)
    ),
    "gate_up_proj": lambda c, name: (
        c.num_experts,
        *_turned(name, 2 * c.moe_intermediate_size, c.hidden_size),
    ),
    "gate_up_proj_bias": lambda c, name: (c.num_experts, 2 * c.moe_intermediate_size),
    "down_proj": lambda c, name: (
        c.num_experts,
        *_turned(name, c.hidden_size, c.moe_intermediate_size),
    ),
    "down_proj_bias": lambda config, name: (config.num_experts, config.hidden_size),
    "layer_scalar": lambda config, name: (1,),
    "correct_output_scale": lambda config, name: (config.hidden_size,),
    "scale": lambda config, name: (config.hidden_size,),  # of a router's inputs
    "per_expert_scale": lambda config, name: (config.num_experts,),
}


def source_shape(config: ModelConfig, name: str) -> Shape:
    """The whole shape of a Hugging Face tensor; what is in no table is a norm."""
    *_, module, kind = name.split(".")
    if ".layers." in name:
        config = config.of_layer(_layer(name))
    if name.startswith("model.altup_"):  # whose last word is a number
        return config.hidden_size, config.hidden_size
    if kind in _TENSORS:
        return _TENSORS[kind](config, name)
    shape = _SHAPES[module](config, name) if module in _SHAPES else (config.hidden_size,)
    return shape[:1] if kind == "bias" else shape


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every Hugging Face tensor that a conversion reads, with its whole shape.

    lm_head.weight is absent when the embeddings are tied.
    """
    names = dict.fromkeys(
        source
        for pp_rank in range(config.mapping.pp_size)
        for row in stage_rows(config, pp_rank)
        for source in row.sources
    )
    return {name: source_shape(config, name) for name in names}


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Every needed tensor is there, floating, and of its shape, before a byte is read.

    Raises CheckpointError naming the first tensor at fault.
    """
    infos, wanted = source.infos, expected_shapes(config)
    for name, shape in wanted.items():
        if name not in infos:
            hint = " (tie_word_embeddings is false in config.json)" if name == LM_HEAD else ""
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint{hint}; wanted {list(shape)}: "
                "do config.json and the weights belong together?"
            )
        info = infos[name]
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(info.shape)}; config.json implies {list(shape)}: "
                "do config.json and the weights belong together?"
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise CheckpointError(
                f"tensor {name} has dtype {str(info.dtype).removeprefix('torch.')}: the checkpoint "
                "is quantised already; give the unquantised one"
            )

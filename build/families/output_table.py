"""What stands in a rank file: the shapes of a decoder's linears, and the table of all tensors.

Source: TensorRT-LLM 1.2.1 checkpoint format, tensor tables per tp and pp.
"""

from __future__ import annotations

from typing import NamedTuple

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.shapes import head_norm_size, source_shape
from enginehouse.build.forms.weight_forms import (
    FLOAT32_WORDS,
    OutputTensor,
    is_quantized,
    linear_tensors,
)
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta, Latent

# Of what layers have beside attention and MLP: each rank has all of it, but of the largest table.
_WHOLE = (
    *("per_layer_projection", "per_layer_gate", "per_layer_proj", "layer"),
    *("stream_projections", "stream_merges", "stream_router", "stream_predictions"),
    *("stream_corrections", "stream", "laurel_left", "laurel_right"),
)
_INPUTS, _INPUT_NORM = "transformer.per_layer_embedding", "transformer.per_layer_layernorm"
KV_SCALE = "transformer.layers.{}.attention.kv_cache_scaling_factor"


class LinearShape(NamedTuple):
    """A linear on one rank, and which of its axes tensor parallelism cuts (0: out, 1: in, -1:
    neither).
    """

    out_features: int
    in_features: int
    cut_axis: int


def linear_shapes(config: ModelConfig, layer: int) -> dict[str, LinearShape]:
    """The linears of a decoder layer, per rank, in the order in which they run; layers count
    through the model. Experts are no linears (`_expert_tensors`), but the shared one's are.
    """
    config = config.of_layer(layer)
    tp, hidden, head = config.mapping.tp_size, config.hidden_size, config.head_size
    heads = config.num_attention_heads // tp
    key = max(1, config.num_key_value_heads // tp) * head
    linears: dict[str, LinearShape] = {}
    if config.latent is not None:
        linears |= _latent_shapes(config, config.latent)
    elif config.has_attention(layer):
        queries = heads * config.query_size
        if config.has_keys(layer):
            linears["attention.qkv"] = LinearShape(queries + 2 * key, hidden, 0)
        else:
            linears["attention.q"] = LinearShape(queries, hidden, 0)
        linears["attention.dense"] = LinearShape(hidden, heads * head, 1)
    elif config.is_linear(layer):
        assert config.delta is not None
        heads = config.delta.key_heads // tp
        linears["linear_attention.in_qkvz"] = LinearShape(heads * config.delta.rows, hidden, 0)
        linears["linear_attention.dense"] = LinearShape(hidden, heads * config.delta.values, 1)
    if config.has_experts(layer):
        if shared := config.shared_expert_size // tp:
            linears["mlp.shared_expert.fc"] = LinearShape(2 * shared, hidden, 0)
            linears["mlp.shared_expert.proj"] = LinearShape(hidden, shared, 1)
        return linears
    inner = config.inner_size(layer) // tp
    if not inner:
        return linears
    if config.gate_in_fc:
        linears["mlp.fc"] = LinearShape(2 * inner, hidden, 0)
    elif not config.gated_mlp:
        linears["mlp.fc"] = LinearShape(inner, hidden, 0)
    else:
        linears["mlp.fc"] = linears["mlp.gate"] = LinearShape(inner, hidden, 0)
    return {**linears, "mlp.proj": LinearShape(hidden, inner, 1)}


def _latent_shapes(config: ModelConfig, latent: Latent) -> dict[str, LinearShape]:
    """Those of latent attention; kv_b, which is multiplied into others, is none."""
    heads, hidden = config.num_attention_heads // config.mapping.tp_size, config.hidden_size
    queries, rank = heads * (latent.nope + latent.rope), latent.query_rank
    linears = {"attention.q": LinearShape(queries, hidden, 0)}
    if rank:
        linears = {
            "attention.q_a": LinearShape(rank, hidden, -1),
            "attention.q_b": LinearShape(queries, rank, 0),
        }
    return {
        **linears,
        "attention.kv_a": LinearShape(latent.rank + latent.rope, hidden, -1),
        "attention.dense": LinearShape(hidden, heads * latent.value, 1),
    }


def output_tensors(
    config: ModelConfig, pp_rank: int, scale_dtype: str | None = None
) -> dict[str, OutputTensor]:
    """The exact table of a rank file; equal on all tensor parallel ranks of a stage.

    scale_dtype: of INT4 scales that the source has already; None for the model's.
    """
    layers = config.mapping.layers(pp_rank, config.num_hidden_layers)
    linears_of = [linear_shapes(config, layer) for layer in layers]
    vocab = config.padded_vocab_size() // config.mapping.tp_size
    table: dict[str, OutputTensor] = {}
    for target, sources in (row[:2] for row in stage_rows(config, pp_rank)):
        module, _, kind = target.rpartition(".")
        name, linear, of_layer = "", None, config
        if ".layers." in module:
            _, _, number, name = module.split(".", 3)
            linear, of_layer = (
                linears_of[int(number)].get(name),
                config.of_layer(layers[int(number)]),
            )
        if module.rpartition(".")[2] in _WHOLE or module == _INPUT_NORM:
            shapes = [source_shape(config, source) for source in sources]
            shape = (sum(each[0] for each in shapes), *shapes[0][1:])
            table[target] = OutputTensor(config.dtype, shape)
        elif module == _INPUTS:
            rows, width = source_shape(config, sources[0])
            rows = -(-rows // config.mapping.tp_size)
            table[target] = OutputTensor(config.dtype, (rows, width))
        elif target.endswith(".sinks"):
            heads = config.num_attention_heads // config.mapping.tp_size
            table[target] = OutputTensor(config.dtype, (heads,))
        elif name == "attention.kv_b":
            rows, columns = source_shape(config, f"model.layers.0.self_attn.kv_b_proj.{kind}")
            table[target] = OutputTensor(config.dtype, (rows // config.mapping.tp_size, columns))
        elif linear is None and name.startswith("linear_attention") and config.delta is not None:
            table[target] = _delta_tensor(config, config.delta, name, kind)
        elif linear is None and name.startswith("mlp."):
            table.update(_mixture_tensors(config, target))
        elif linear is None:
            vocabulary = module in ("transformer.vocab_embedding", "lm_head")
            width = head_norm_size(of_layer, name) or config.hidden_size
            shape = (vocab, width)[: 2 if kind == "weight" else 1] if vocabulary else (width,)
            table[target] = OutputTensor(config.dtype, shape)
        elif kind == "bias":
            table[target] = OutputTensor(config.dtype, (linear.out_features,))
        else:
            quantization, dtype = config.quantization, config.dtype
            table.update(linear_tensors(quantization, dtype, module, *linear[:2], scale_dtype))
    if config.quantization.kv_cache_quant_algo is not None:
        for local, layer in enumerate(layers):
            if config.has_keys(layer):
                table[KV_SCALE.format(local)] = OutputTensor("float32", (1,))
    return table


def _delta_tensor(config: ModelConfig, delta: Delta, name: str, kind: str) -> OutputTensor:
    """What linear attention has beside its linears: how fast its states fade is float32."""
    tp = config.mapping.tp_size
    if kind in FLOAT32_WORDS:
        return OutputTensor("float32", (delta.value_heads // tp,))
    shapes = {
        "linear_attention.in_ba": (2 * delta.value_heads // tp, config.hidden_size),
        "linear_attention.conv1d": (delta.key_heads // tp * delta.mixed, delta.kernel),
        "linear_attention.layernorm": (delta.value_size,),
    }
    return OutputTensor(config.dtype, shapes[name])


def distinct_linears(config: ModelConfig) -> dict[tuple[str, LinearShape], None]:
    """Every linear of the model's layers by its name and shape, each once, in their order; and
    those of one expert.
    """
    layers = range(config.num_hidden_layers)
    found = [one for layer in layers for one in linear_shapes(config, layer).items()]
    if config.num_experts:
        inner = config.moe_intermediate_size // config.mapping.tp_size
        found.append(("mlp.fc", LinearShape(2 * inner, config.hidden_size, 0)))
        found.append(("mlp.proj", LinearShape(config.hidden_size, inner, 1)))
    return dict.fromkeys(found)


def _mixture_tensors(config: ModelConfig, target: str) -> dict[str, OutputTensor]:
    """What tells a token's experts and shares, float32 in every form but the shared expert's gate;
    or all experts in one tensor.
    """
    experts, hidden = config.num_experts, config.hidden_size
    module, _, kind = target.rpartition(".")
    word = module.rpartition(".")[2]
    if word == "router":  # its bias, corrections and scales are a number for each expert
        shape = (experts, hidden) if kind == "weight" else (experts,)
        return {target: OutputTensor("float32", shape)}
    if word == "shared_expert_gate":
        return {target: OutputTensor(config.dtype, (1, hidden))}
    inner = config.moe_intermediate_size // config.mapping.tp_size
    out_features, in_features = {"fc": (2 * inner, hidden), "proj": (hidden, inner)}[word]
    if kind == "bias":
        return {target: OutputTensor(config.dtype, (experts, out_features))}
    whole = (experts, out_features, in_features)
    if not is_quantized(config.quantization, target):
        return {target: OutputTensor(config.dtype, whole)}
    form, dtype = config.quantization, config.dtype
    if form.quant_algo != "FP8":
        each = linear_tensors(form, dtype, module, out_features, in_features).items()
        return {name: OutputTensor(item.dtype, (experts, *item.shape)) for name, item in each}
    return {
        target: OutputTensor("float8_e4m3fn", whole),
        f"{module}.activation_scaling_factor": OutputTensor("float32", (1,)),
        f"{module}.weights_scaling_factor": OutputTensor("float32", (experts, 1)),
    }

"""What stands in a rank file: the shapes of a decoder's linears, and the table of all tensors.

Source: TensorRT-LLM 1.2.1 checkpoint format, tensor tables per tp and pp.
"""

from __future__ import annotations

from typing import NamedTuple

from enginehouse.build.families.architectures import head_norm_size, stage_rows
from enginehouse.build.forms.weight_forms import OutputTensor, is_quantized, linear_tensors
from enginehouse.runtime.config import ModelConfig

KV_SCALE = "transformer.layers.{}.attention.kv_cache_scaling_factor"


class LinearShape(NamedTuple):
    """A linear on one rank, and which of its axes tensor parallelism cuts (0: out, 1: in)."""

    out_features: int
    in_features: int
    cut_axis: int


def linear_shapes(config: ModelConfig) -> dict[str, LinearShape]:
    """The linears of one decoder layer, per rank; experts are no linears (`_expert_tensors`)."""
    tp, hidden, head = config.mapping.tp_size, config.hidden_size, config.head_size
    query = config.num_attention_heads // tp * head
    key = max(1, config.num_key_value_heads // tp) * head
    inner = config.intermediate_size // tp
    linears = {
        "attention.qkv": LinearShape(query + 2 * key, hidden, 0),
        "attention.dense": LinearShape(hidden, query, 1),
    }
    if config.num_experts:
        return linears
    if config.gate_in_fc:
        linears["mlp.fc"] = LinearShape(2 * inner, hidden, 0)
    elif not config.gated_mlp:
        linears["mlp.fc"] = LinearShape(inner, hidden, 0)
    else:
        linears["mlp.fc"] = linears["mlp.gate"] = LinearShape(inner, hidden, 0)
    return {**linears, "mlp.proj": LinearShape(hidden, inner, 1)}


def output_tensors(
    config: ModelConfig, pp_rank: int, scale_dtype: str | None = None
) -> dict[str, OutputTensor]:
    """The exact table of a rank file; equal on all tensor parallel ranks of a stage.

    scale_dtype: of INT4 scales that the source has already; None for the model's.
    """
    linears = linear_shapes(config)
    vocab = config.padded_vocab_size() // config.mapping.tp_size
    table: dict[str, OutputTensor] = {}
    for target in (row.target for row in stage_rows(config, pp_rank)):
        module, _, kind = target.rpartition(".")
        name = ".".join(module.split(".")[-2:])
        linear = linears.get(name)
        if linear is None and name.startswith("mlp."):
            table.update(_expert_tensors(config, module))
        elif linear is None:
            vocabulary = module in ("transformer.vocab_embedding", "lm_head")
            width = head_norm_size(config, name) or config.hidden_size
            shape = (vocab, width) if vocabulary else (width,)
            table[target] = OutputTensor(config.dtype, shape)
        elif kind == "bias":
            table[target] = OutputTensor(config.dtype, (linear.out_features,))
        else:
            quantization, dtype = config.quantization, config.dtype
            table.update(linear_tensors(quantization, dtype, module, *linear[:2], scale_dtype))
    if config.quantization.kv_cache_quant_algo is not None:
        for local in range(len(config.mapping.layers(pp_rank, config.num_hidden_layers))):
            table[KV_SCALE.format(local)] = OutputTensor("float32", (1,))
    return table


def _expert_tensors(config: ModelConfig, module: str) -> dict[str, OutputTensor]:
    """A mixture's router, float32 in every form, or all its experts in one tensor."""
    experts, hidden = config.num_experts, config.hidden_size
    inner = config.moe_intermediate_size // config.mapping.tp_size
    shape = {
        "router": (experts, hidden),
        "fc": (experts, 2 * inner, hidden),
        "proj": (experts, hidden, inner),
    }[module.rpartition(".")[2]]
    if len(shape) == 2:
        return {f"{module}.weight": OutputTensor("float32", shape)}
    if not is_quantized(config.quantization, f"{module}.weight"):
        return {f"{module}.weight": OutputTensor(config.dtype, shape)}
    assert config.quantization.quant_algo == "FP8", config.quantization
    return {
        f"{module}.weight": OutputTensor("float8_e4m3fn", shape),
        f"{module}.activation_scaling_factor": OutputTensor("float32", (1,)),
        f"{module}.weights_scaling_factor": OutputTensor("float32", (experts, 1)),
    }

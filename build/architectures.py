"""Tables: which Hugging Face tensors make which TensorRT-LLM tensor, family by family.

Also the translation of config.json from one vocabulary to the other. This file knows names
and shapes of whole tensors; it knows no rank, no file and no quantised form.
Source: TensorRT-LLM 1.2.1 checkpoint format (`config.json`, tensor names); transformers'
`LlamaConfig` and `MistralConfig`, versions 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from enginehouse.build.checkpoint import TensorSource
from enginehouse.runtime.config import DTYPES, ModelConfig
from enginehouse.runtime.errors import CheckpointError

ROPE_TYPES = ("linear", "dynamic", "llama3", "longrope", "yarn")
_REMEDY = "is it the config.json of a complete checkpoint?"


class TensorRow(NamedTuple):
    """One TensorRT-LLM tensor: `sources` concatenated along dim 0. `{}` is the global layer."""

    target: str
    sources: tuple[str, ...]
    optional: bool = False  # left out when none of its sources exists


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family: its rows, and the config.json keys that only it has.

    lm_head reads the embedding when the two are tied (`stage_rows`).
    """

    name: str
    first_rows: tuple[TensorRow, ...]  # on the first pipeline stage
    layer_rows: tuple[TensorRow, ...]
    last_rows: tuple[TensorRow, ...]  # on the last pipeline stage
    config_extra: Mapping[str, Any]


EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def _linear(target: str, *sources: str) -> tuple[TensorRow, ...]:
    """A linear's weight, and its bias where the model has one."""
    target = f"transformer.layers.{{}}.{target}"
    sources = tuple(f"model.layers.{{}}.{source}" for source in sources)
    return (
        TensorRow(f"{target}.weight", tuple(f"{source}.weight" for source in sources)),
        TensorRow(f"{target}.bias", tuple(f"{source}.bias" for source in sources), optional=True),
    )


_LLAMA_LAYER_ROWS = (
    TensorRow(
        "transformer.layers.{}.input_layernorm.weight",
        ("model.layers.{}.input_layernorm.weight",),
    ),
    *_linear("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *_linear("attention.dense", "self_attn.o_proj"),
    *_linear("mlp.fc", "mlp.gate_proj"),  # act(fc(x)) * gate(x): fc is Hugging Face's gate
    *_linear("mlp.proj", "mlp.down_proj"),
    *_linear("mlp.gate", "mlp.up_proj"),
    TensorRow(
        "transformer.layers.{}.post_layernorm.weight",
        ("model.layers.{}.post_attention_layernorm.weight",),
    ),
)


def _llama(name: str) -> Architecture:
    return Architecture(
        name=name,
        first_rows=(TensorRow("transformer.vocab_embedding.weight", (EMBEDDING,)),),
        layer_rows=_LLAMA_LAYER_ROWS,
        last_rows=(
            TensorRow("transformer.ln_f.weight", ("model.norm.weight",)),
            TensorRow("lm_head.weight", (LM_HEAD,)),
        ),
        config_extra={
            "qk_layernorm": False,
            "residual_mlp": False,
            "disable_weight_only_quant_plugin": False,
            "remove_duplicated_kv_heads": False,
        },
    )


ARCHITECTURES: dict[str, Architecture] = {
    name: _llama(name) for name in ("LlamaForCausalLM", "MistralForCausalLM")
}


def architecture_of(name: str) -> Architecture:
    """The family's tables; CheckpointError lists the supported ones."""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {name} is not supported; choose a checkpoint of {supported()}"
        )
    return ARCHITECTURES[name]


def supported() -> str:
    return ", ".join(ARCHITECTURES)


def stage_rows(config: ModelConfig, pp_rank: int) -> list[TensorRow]:
    """The rows of one pipeline stage with every `{}` filled in, in the order of the model.

    Targets count layers from 0 in each stage, sources through the whole model. Biases that the
    model lacks are left out; a tied lm_head reads the embedding.
    """
    architecture = architecture_of(config.architecture)
    rows = list(architecture.first_rows) if pp_rank == 0 else []
    for local, layer in enumerate(config.mapping.layers(pp_rank, config.num_hidden_layers)):
        rows += [
            TensorRow(row.target.format(local), tuple(name.format(layer) for name in row.sources))
            for row in architecture.layer_rows
            if not row.optional or _has_bias(config, row.target)
        ]
    if pp_rank == config.mapping.pp_size - 1:
        tied = config.tie_word_embeddings
        rows += [
            row._replace(sources=(EMBEDDING,)) if tied and row.sources == (LM_HEAD,) else row
            for row in architecture.last_rows
        ]
    return rows


def _has_bias(config: ModelConfig, name: str) -> bool:
    return config.mlp_bias if ".mlp." in name else config.attn_bias


def model_config(hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    """A Hugging Face config in TensorRT-LLM's words, for one GPU and unquantised.

    dtype: "auto" (the checkpoint's; bfloat16 for float32) or one of DTYPES.
    Raises CheckpointError for a missing key, and for what the engine cannot run.
    """
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"config.json has no architectures; {_REMEDY}")
    architecture = architecture_of(str(names[0]))
    if isinstance(quantised := hf.get("quantization_config"), dict):
        raise CheckpointError(
            f"config.json has quantization_config with quant_method="
            f"{quantised.get('quant_method')!r}: the checkpoint is quantised already; "
            "give the unquantised one"
        )
    heads, hidden = _integer(hf, "num_attention_heads"), _integer(hf, "hidden_size")
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json has hidden_act={activation!r}; wanted 'silu'")
    kv_heads = _integer(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has num_attention_heads={heads}, which num_key_value_heads={kv_heads} "
            f"does not divide; {_REMEDY}"
        )
    head_size = _integer(hf, "head_dim", hidden // heads)
    if head_size % 2:
        raise CheckpointError(f"config.json gives a head size of {head_size}; wanted an even one")
    rope = _rope(hf)
    return ModelConfig(
        architecture=architecture.name,
        dtype=_dtype(hf, dtype),
        vocab_size=_integer(hf, "vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=_integer(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head_size,
        intermediate_size=_integer(hf, "intermediate_size"),
        norm_epsilon=_number(hf, "rms_norm_eps"),
        max_position_embeddings=_integer(hf, "max_position_embeddings"),
        hidden_act="silu",
        rotary_base=rope.base,
        rotary_scaling=rope.scaling,
        attn_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        extra=dict(architecture.config_extra),
    )


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key}; {_REMEDY}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive number")
    return float(value)


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _number(hf, key, default)
    if not value.is_integer():
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive whole number")
    return int(value)


def _dtype(hf: Mapping[str, Any], asked: str) -> str:
    if asked == "auto":
        asked = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if asked == "float32":
            return "bfloat16"
    if asked not in DTYPES:
        raise CheckpointError(f"dtype {asked!r} is not known; choose one of {', '.join(DTYPES)}")
    return asked


def sliding_window(hf: Mapping[str, Any]) -> int | None:
    """The attention window when the model uses one that is shorter than its context.

    It is no part of a TensorRT-LLM checkpoint: contexts up to the window are exact without it.
    """
    window, context = hf.get("sliding_window"), hf.get("max_position_embeddings")
    if not isinstance(window, int) or hf.get("use_sliding_window") is False:
        return None
    return window if isinstance(context, int) and window < context else None


class _Rope(NamedTuple):
    base: float
    scaling: dict[str, Any] | None


def _rope(hf: Mapping[str, Any]) -> _Rope:
    """rope_theta with rope_scaling (transformers 4), or rope_parameters (5), in one form.

    TensorRT-LLM looks `type` up before `rope_type`: both are written.
    """
    parameters = dict(hf.get("rope_parameters") or {})
    scaling = dict(hf.get("rope_scaling") or {})
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise CheckpointError(
            f"config.json has rope_parameters for each layer type ({', '.join(nested)}); "
            "wanted one rope for all layers"
        )
    theta = parameters.pop("rope_theta", None) or hf.get("rope_theta")
    base = _number({"rope_theta": theta}, "rope_theta", 10000.0)
    partial = parameters.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise CheckpointError(f"config.json has partial_rotary_factor={partial}; wanted 1.0")
    scaling = scaling or parameters
    scaling.pop("rope_theta", None)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    kind = {"su": "longrope", "none": "default"}.get(kind, kind)
    if kind == "default":
        return _Rope(base, None)
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json asks for rope type {kind!r}; wanted none or one of "
            + ", ".join(ROPE_TYPES)
        )
    if kind != "longrope":
        _number(scaling, "factor")
    return _Rope(base, {**scaling, "type": kind, "rope_type": kind})


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor that a conversion reads, with its whole shape.

    lm_head.weight is absent when the embeddings are tied.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_size
    key = config.num_key_value_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if _has_bias(config, f".{name}"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


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
    extra = [name for name in infos if name.endswith("_proj.bias") and name not in wanted]
    if extra:
        raise CheckpointError(
            f"tensor {extra[0]} is a bias that config.json does not announce "
            "(attention_bias, mlp_bias): do config.json and the weights belong together?"
        )

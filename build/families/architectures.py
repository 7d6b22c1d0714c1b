"""Tables: which Hugging Face tensors make which TensorRT-LLM tensor, family by family.

This file knows names and shapes of whole tensors; it knows no rank, no file and no quantised
form. What config.json says is translated in hf_config.py.
Source: TensorRT-LLM 1.2.1 checkpoint format (tensor names); transformers' models, 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from enginehouse.build.source import TensorSource
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

# What is done to the sources once they are concatenated along dim 0 (`convert.read_row`):
# split into as many experts; halves exchanged; one added.
Recipe = Literal["join", "experts", "swap_halves", "plus_one"]


class TensorRow(NamedTuple):
    """One TensorRT-LLM tensor: `sources` concatenated along dim 0. `{}` is the global layer."""

    target: str
    sources: tuple[str, ...]
    optional: bool = False  # left out when none of its sources exists
    recipe: Recipe = "join"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family: its rows, in the order of the model.

    lm_head reads the embedding when the two are tied; `{expert}` stands for each expert in turn
    (`stage_rows`). for_trtllm: TensorRT-LLM 1.2.1 has a class whose checkpoint this is.
    """

    name: str
    first_rows: tuple[TensorRow, ...]  # on the first pipeline stage
    layer_rows: tuple[TensorRow, ...]
    last_rows: tuple[TensorRow, ...]  # on the last pipeline stage
    for_trtllm: bool = True


EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_TARGET, _SOURCE = "transformer.layers.{}.", "model.layers.{}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _row(target: str, *sources: str, recipe: Recipe = "join") -> TensorRow:
    """A layer's weight."""
    names = tuple(f"{_SOURCE}{source}.weight" for source in sources)
    return TensorRow(f"{_TARGET}{target}.weight", names, recipe=recipe)


def _linear(target: str, *sources: str) -> tuple[TensorRow, ...]:
    """A linear's weight, and its bias where the model has one."""
    names = tuple(f"{_SOURCE}{source}.bias" for source in sources)
    return _row(target, *sources), TensorRow(f"{_TARGET}{target}.bias", names, optional=True)


def _norms(recipe: Recipe, **sources: str) -> tuple[TensorRow, ...]:
    return tuple(_row(target, source, recipe=recipe) for target, source in sources.items())


def _norm_biases(**sources: str) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(f"{_TARGET}{target}.bias", (f"{_SOURCE}{source}.bias",))
        for target, source in sources.items()
    )


_LLAMA_ATTENTION = (
    *_linear("attention.qkv", *_QKV),
    *_linear("attention.dense", "self_attn.o_proj"),
)
# Qwen2 has a bias on q, k, v and none on o; the families below have none.
_QWEN2_ATTENTION = (*_linear("attention.qkv", *_QKV), _row("attention.dense", "self_attn.o_proj"))
_PLAIN_ATTENTION = (_row("attention.qkv", *_QKV), _row("attention.dense", "self_attn.o_proj"))


def _qk_norms(recipe: Recipe) -> tuple[TensorRow, ...]:
    return (
        _row("attention.q_layernorm", "self_attn.q_norm", recipe=recipe),
        _row("attention.k_layernorm", "self_attn.k_norm", recipe=recipe),
    )


_LLAMA_MLP = (
    *_linear("mlp.fc", "mlp.gate_proj"),  # act(fc(x)) * gate(x): fc is Hugging Face's gate
    *_linear("mlp.proj", "mlp.down_proj"),
    *_linear("mlp.gate", "mlp.up_proj"),
)
_PLAIN_MLP = tuple(row for row in _LLAMA_MLP if not row.optional)
_PHI3_ATTENTION = (
    _row("attention.qkv", "self_attn.qkv_proj"),  # q, k, v rows in this order already
    _row("attention.dense", "self_attn.o_proj"),
)
_PHI3_MLP = (
    _row("mlp.fc", "mlp.gate_up_proj", recipe="swap_halves"),  # up first, then gate
    _row("mlp.proj", "mlp.down_proj"),
)


def _experts(router: str, up: str, gate: str, down: str) -> tuple[TensorRow, ...]:
    """[experts, 2 * moe_intermediate_size, hidden]: of each expert up first, then gate."""
    return (
        _row("mlp.router", router),
        _row("mlp.fc", up, gate, recipe="experts"),
        _row("mlp.proj", down, recipe="experts"),
    )


_MIXTRAL = "block_sparse_moe.experts.{expert}."
_MIXTRAL_MLP = _experts("block_sparse_moe.gate", f"{_MIXTRAL}w3", f"{_MIXTRAL}w1", f"{_MIXTRAL}w2")
_QWEN = "mlp.experts.{expert}."
_QWEN_MOE_MLP = _experts("mlp.gate", f"{_QWEN}up_proj", f"{_QWEN}gate_proj", f"{_QWEN}down_proj")

_LLAMA_NORMS = dict(input_layernorm="input_layernorm", post_layernorm="post_attention_layernorm")
_ONE_NORM = dict(input_layernorm="input_layernorm")
_NORMS_BEHIND = dict(
    post_layernorm="post_attention_layernorm",
    post_feedforward_layernorm="post_feedforward_layernorm",
)
_GEMMA2_NORMS = dict(
    _LLAMA_NORMS,
    pre_feedforward_layernorm="pre_feedforward_layernorm",
    post_feedforward_layernorm="post_feedforward_layernorm",
)


def _family(
    name: str,
    attention: tuple[TensorRow, ...],
    mlp: tuple[TensorRow, ...],
    norms: dict[str, str] = _LLAMA_NORMS,
    norm_recipe: Recipe = "join",
    for_trtllm: bool = True,
    norm_biases: bool = False,
) -> Architecture:
    first_norm, *other_norms = _norms(norm_recipe, **norms)
    biases = _norm_biases(**norms) if norm_biases else ()
    last_bias = TensorRow("transformer.ln_f.bias", ("model.norm.bias",))
    return Architecture(
        name=name,
        first_rows=(TensorRow("transformer.vocab_embedding.weight", (EMBEDDING,)),),
        layer_rows=(first_norm, *attention, *mlp, *other_norms, *biases),
        last_rows=(
            TensorRow("transformer.ln_f.weight", ("model.norm.weight",), recipe=norm_recipe),
            *((last_bias,) if norm_biases else ()),
            TensorRow("lm_head.weight", (LM_HEAD,)),
        ),
        for_trtllm=for_trtllm,
    )


_QWEN3_ATTENTION = (*_PLAIN_ATTENTION, *_qk_norms("join"))
_GEMMA3_ATTENTION = (*_PLAIN_ATTENTION, *_qk_norms("plus_one"))
_FAMILIES = (
    _family("LlamaForCausalLM", _LLAMA_ATTENTION, _LLAMA_MLP),
    _family("MistralForCausalLM", _LLAMA_ATTENTION, _LLAMA_MLP),
    _family("MixtralForCausalLM", _PLAIN_ATTENTION, _MIXTRAL_MLP),
    _family("Qwen2ForCausalLM", _QWEN2_ATTENTION, _PLAIN_MLP),
    _family("Qwen3ForCausalLM", _QWEN3_ATTENTION, _PLAIN_MLP),
    _family("Qwen3MoeForCausalLM", _QWEN3_ATTENTION, _QWEN_MOE_MLP),
    _family("Phi3ForCausalLM", _PHI3_ATTENTION, _PHI3_MLP),
    # Gemma's norms multiply by 1 + weight: the 1 is written into the weight.
    _family("GemmaForCausalLM", _PLAIN_ATTENTION, _PLAIN_MLP, norm_recipe="plus_one"),
    _family("Gemma2ForCausalLM", _PLAIN_ATTENTION, _PLAIN_MLP, _GEMMA2_NORMS, "plus_one"),
    _family("Gemma3ForCausalLM", _GEMMA3_ATTENTION, _PLAIN_MLP, _GEMMA2_NORMS, "plus_one"),
)
_own = partial(_family, for_trtllm=False)
_GLM4_NORMS = dict(
    input_layernorm="input_layernorm",
    post_layernorm="post_self_attn_layernorm",
    pre_feedforward_layernorm="post_attention_layernorm",
    post_feedforward_layernorm="post_mlp_layernorm",
)
# act(fc(x)), and no gate
_UNGATED_MLP = (*_linear("mlp.fc", "mlp.up_proj"), *_linear("mlp.proj", "mlp.down_proj"))
_STARCODER2_MLP = (*_linear("mlp.fc", "mlp.c_fc"), *_linear("mlp.proj", "mlp.c_proj"))
_OWN_FAMILIES = (
    # Nemotron's norms multiply by 1 + weight too.
    _own(
        "NemotronForCausalLM",
        _LLAMA_ATTENTION,
        _UNGATED_MLP,
        norm_recipe="plus_one",
        norm_biases=True,
    ),
    _own("ArceeForCausalLM", _LLAMA_ATTENTION, _UNGATED_MLP),
    _own("Starcoder2ForCausalLM", _LLAMA_ATTENTION, _STARCODER2_MLP, norm_biases=True),
    _own("StableLmForCausalLM", _QWEN2_ATTENTION, _PLAIN_MLP, norm_biases=True),
    # One norm for attention and the MLP beside it.
    _own("CohereForCausalLM", _PLAIN_ATTENTION, _PLAIN_MLP, _ONE_NORM),
    _own("Cohere2ForCausalLM", _PLAIN_ATTENTION, _PLAIN_MLP, _ONE_NORM),
    _own("GlmForCausalLM", _QWEN2_ATTENTION, _PHI3_MLP),
    _own("Glm4ForCausalLM", _QWEN2_ATTENTION, _PHI3_MLP, _GLM4_NORMS),
    _own("Ernie4_5ForCausalLM", _LLAMA_ATTENTION, _LLAMA_MLP),
    _own("HeliumForCausalLM", _PLAIN_ATTENTION, _PLAIN_MLP),
    _own("GraniteForCausalLM", _LLAMA_ATTENTION, _LLAMA_MLP),
    _own("GraniteMoeForCausalLM", _PLAIN_ATTENTION, _QWEN_MOE_MLP),
    _own("SmolLM3ForCausalLM", _LLAMA_ATTENTION, _LLAMA_MLP),
    _own("SeedOssForCausalLM", _QWEN2_ATTENTION, _PLAIN_MLP),
    _own("OlmoeForCausalLM", _QWEN3_ATTENTION, _QWEN_MOE_MLP),
    # Norms on what attention and MLP give alone.
    _own("Olmo2ForCausalLM", _QWEN3_ATTENTION, _PLAIN_MLP, _NORMS_BEHIND),
    _own("Olmo3ForCausalLM", _QWEN3_ATTENTION, _PLAIN_MLP, _NORMS_BEHIND),
    _own("Exaone4ForCausalLM", _QWEN3_ATTENTION, _PLAIN_MLP, _NORMS_BEHIND),
)
ARCHITECTURES: dict[str, Architecture] = {
    family.name: family for family in (*_FAMILIES, *_OWN_FAMILIES)
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
            row._replace(
                target=row.target.format(local), sources=_layer_sources(row, layer, config)
            )
            for row in architecture.layer_rows
            if not row.optional or _has_bias(config, row.target)
        ]
    if pp_rank == config.mapping.pp_size - 1:
        tied = config.tie_word_embeddings
        rows += [
            row._replace(sources=(EMBEDDING,)) if tied and row.sources == (LM_HEAD,) else row
            for row in architecture.last_rows
        ]
    return [row._replace(optional=False) for row in rows]


def _layer_sources(row: TensorRow, layer: int, config: ModelConfig) -> tuple[str, ...]:
    experts = range(config.num_experts) if row.recipe == "experts" else range(1)
    return tuple(name.format(layer, expert=e) for e in experts for name in row.sources)


def recipe_of(config: ModelConfig, sources: Sequence[str]) -> Recipe:
    """How a tensor is made of `sources`, which are all of its row."""
    family, (word, kind) = architecture_of(config.architecture), sources[0].split(".")[-2:]
    rows = reversed((*family.layer_rows, *family.last_rows))
    recipes = {tuple(row.sources[0].split(".")[-2:]): row.recipe for row in rows}
    return recipes.get((word, kind)) or recipes.get((word, "weight"), "join")


def _has_bias(config: ModelConfig, name: str) -> bool:
    return config.mlp_bias if ".mlp." in name else config.attn_bias


Shape = tuple[int, ...]


def head_norm_size(config: ModelConfig, module: str) -> int:
    """Numbers of a norm on queries or keys; 0 of another norm. One over all heads is whole on each
    rank, as what it divides by is.
    """
    heads = {
        "attention.q_layernorm": config.num_attention_heads,
        "attention.k_layernorm": config.num_key_value_heads,
    }.get(module, 0)
    over_all = config.extra.get("qk_layernorm_all_heads", False)
    return config.head_size * (heads if over_all else min(heads, 1))


# The whole shape of a source, by the last word of its module's name.
_SHAPES: dict[str, Callable[[ModelConfig], Shape]] = {
    "embed_tokens": lambda c: (c.vocab_size, c.hidden_size),
    "lm_head": lambda c: (c.vocab_size, c.hidden_size),
    "q_proj": lambda c: (c.num_attention_heads * c.head_size, c.hidden_size),
    "k_proj": lambda c: (c.num_key_value_heads * c.head_size, c.hidden_size),
    "v_proj": lambda c: (c.num_key_value_heads * c.head_size, c.hidden_size),
    "qkv_proj": lambda c: (c.qkv_size, c.hidden_size),
    "o_proj": lambda c: (c.hidden_size, c.num_attention_heads * c.head_size),
    "q_norm": lambda c: (head_norm_size(c, "attention.q_layernorm"),),
    "k_norm": lambda c: (head_norm_size(c, "attention.k_layernorm"),),
    "gate_proj": lambda c: (c.moe_intermediate_size, c.hidden_size),
    "up_proj": lambda c: (c.moe_intermediate_size, c.hidden_size),
    "gate_up_proj": lambda c: (2 * c.intermediate_size, c.hidden_size),
    "down_proj": lambda c: (c.hidden_size, c.moe_intermediate_size),
    "c_fc": lambda c: (c.intermediate_size, c.hidden_size),
    "c_proj": lambda c: (c.hidden_size, c.intermediate_size),
    "w1": lambda c: (c.moe_intermediate_size, c.hidden_size),
    "w3": lambda c: (c.moe_intermediate_size, c.hidden_size),
    "w2": lambda c: (c.hidden_size, c.moe_intermediate_size),
    "gate": lambda c: (c.num_experts, c.hidden_size),
}


def source_shape(config: ModelConfig, name: str) -> Shape:
    """The whole shape of a Hugging Face tensor; what is in no table is a norm."""
    *_, module, kind = name.split(".")
    shape = _SHAPES[module](config) if module in _SHAPES else (config.hidden_size,)
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

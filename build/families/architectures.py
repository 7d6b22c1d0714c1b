"""Tables: which Hugging Face tensors make which TensorRT-LLM tensor, family by family.

This file knows names of whole tensors; it knows no rank, no file and no quantised
form. What config.json says is translated in hf_config.py.
Source: TensorRT-LLM 1.2.1 checkpoint format (tensor names); transformers' models, 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from enginehouse.build.families import mixture_rows as mixtures
from enginehouse.build.families import rows
from enginehouse.build.families.rows import EMBEDDING, LM_HEAD, Recipe, TensorRow, When
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError


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


def _has_head_bias(config: ModelConfig, layer: int) -> bool:
    return bool(config.extra.get("lm_head_bias", False))


def _family(
    name: str,
    attention: tuple[TensorRow, ...],
    mlp: tuple[TensorRow, ...],
    norms: dict[str, str] = rows.LLAMA_NORMS,
    norm_recipe: Recipe = "join",
    for_trtllm: bool = True,
    norm_biases: bool = False,
    last_norm: str | None = "model.norm",
) -> Architecture:
    """norm_biases: whether norms have a bias. last_norm: None where it has no weight."""
    all_norms = rows.norms(norm_recipe, **norms)
    biases = rows.norm_biases(**norms) if norm_biases else ()
    last: list[TensorRow] = []
    if last_norm is not None:
        last.append(
            TensorRow("transformer.ln_f.weight", (f"{last_norm}.weight",), recipe=norm_recipe)
        )
        if norm_biases:
            last.append(TensorRow("transformer.ln_f.bias", (f"{last_norm}.bias",)))
    last.append(TensorRow("lm_head.weight", (LM_HEAD,)))
    last.append(TensorRow("lm_head.bias", ("lm_head.bias",), when=_has_head_bias))
    return Architecture(
        name=name,
        first_rows=(TensorRow("transformer.vocab_embedding.weight", (EMBEDDING,)),),
        layer_rows=(*all_norms[:1], *attention, *mlp, *all_norms[1:], *biases),
        last_rows=tuple(last),
        for_trtllm=for_trtllm,
    )


_FAMILIES = (
    _family("LlamaForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _family("MistralForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _family("MixtralForCausalLM", rows.PLAIN_ATTENTION, mixtures.MIXTRAL_MLP),
    _family("Qwen2ForCausalLM", rows.QWEN2_ATTENTION, rows.PLAIN_MLP),
    _family("Qwen3ForCausalLM", rows.QWEN3_ATTENTION, rows.PLAIN_MLP),
    _family("Qwen3MoeForCausalLM", rows.QWEN3_ATTENTION, mixtures.QWEN_MOE_MLP),
    _family("Phi3ForCausalLM", rows.PHI3_ATTENTION, rows.PHI3_MLP),
    # Gemma's norms multiply by 1 + weight: the 1 is written into the weight.
    _family("GemmaForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP, norm_recipe="plus_one"),
    _family(
        "Gemma2ForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP, rows.GEMMA2_NORMS, "plus_one"
    ),
    _family(
        "Gemma3ForCausalLM", rows.GEMMA3_ATTENTION, rows.PLAIN_MLP, rows.GEMMA2_NORMS, "plus_one"
    ),
)
_own = partial(_family, for_trtllm=False)


def _with_gaps(family: Architecture) -> Architecture:
    """Its layers may lack attention or the MLP, and the norm before it."""
    parts: dict[str, When] = {
        **dict.fromkeys((".attention.", ".input_layernorm."), ModelConfig.has_attention),
        **dict.fromkeys((".mlp.", ".post_layernorm."), ModelConfig.has_mlp),
    }
    rows = (
        row._replace(when=next(when for part, when in parts.items() if part in row.target))
        for row in family.layer_rows
    )
    return replace(family, layer_rows=tuple(rows))


def _under(family: Architecture, names: dict[str, str]) -> Architecture:
    """Its sources begin otherwise: the usual beginning, and the family's own; the first counts."""

    def renamed(row: TensorRow) -> TensorRow:
        found = [next((u for u in names if s.startswith(u)), "") for s in row.sources]
        sources = zip(found, row.sources, strict=True)
        return row._replace(
            sources=tuple(names.get(usual, "") + s.removeprefix(usual) for usual, s in sources)
        )

    return replace(
        family,
        first_rows=tuple(map(renamed, family.first_rows)),
        layer_rows=tuple(map(renamed, family.layer_rows)),
        last_rows=tuple(map(renamed, family.last_rows)),
    )


def _with_layer_inputs(family: Architecture) -> Architecture:
    """Tables of what each layer gets of a token besides, where a model has them, and a multiplier
    of what each gives.
    """
    layers = (*family.layer_rows, *rows.LAYER_INPUTS, *rows.LAYER_SCALE)
    return replace(family, first_rows=(*family.first_rows, *rows.INPUT_TABLES), layer_rows=layers)


def _with_streams(family: Architecture) -> Architecture:
    """Several residual streams, and what each layer gets of a token besides."""
    tables = (
        TensorRow(f"transformer.{target}.weight", (f"model.{source}.{{stream}}.weight",))
        for target, source in (
            ("stream_projections", "altup_projections"),
            ("stream_merges", "altup_unembed_projections"),
        )
    )
    opened, merged = tables
    return replace(
        family,
        first_rows=(*family.first_rows, *rows.INPUT_TABLES, opened),
        layer_rows=(*family.layer_rows, *rows.STREAMS, *rows.LAYER_INPUTS),
        last_rows=(merged, *family.last_rows),
    )


# Of GLM-4.5's models the larger norms its heads, the smaller (Air) does not.
_GLM4_MOE_NORMS = rows.only(
    lambda config, layer: bool(config.extra["qk_layernorm"]), rows.qk_norms()
)
_OWN_FAMILIES = (
    # Nemotron's norms multiply by 1 + weight too.
    _own(
        "NemotronForCausalLM",
        rows.LLAMA_ATTENTION,
        rows.UNGATED_MLP,
        norm_recipe="plus_one",
        norm_biases=True,
    ),
    _own("ArceeForCausalLM", rows.LLAMA_ATTENTION, rows.UNGATED_MLP),
    _own("Starcoder2ForCausalLM", rows.LLAMA_ATTENTION, rows.STARCODER2_MLP, norm_biases=True),
    _own("StableLmForCausalLM", rows.QWEN2_ATTENTION, rows.PLAIN_MLP, norm_biases=True),
    # One norm for attention and the MLP beside it.
    _own("CohereForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP, rows.ONE_NORM),
    _own("Cohere2ForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP, rows.ONE_NORM),
    _own("GlmForCausalLM", rows.QWEN2_ATTENTION, rows.PHI3_MLP),
    _own("Glm4ForCausalLM", rows.QWEN2_ATTENTION, rows.PHI3_MLP, rows.GLM4_NORMS),
    _own("Ernie4_5ForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _own("HeliumForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP),
    _own("GraniteForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _own("GraniteMoeForCausalLM", rows.PLAIN_ATTENTION, mixtures.QWEN_MOE_MLP),
    _own("SmolLM3ForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _own("SeedOssForCausalLM", rows.QWEN2_ATTENTION, rows.PLAIN_MLP),
    _own("OlmoeForCausalLM", rows.QWEN3_ATTENTION, mixtures.QWEN_MOE_MLP),
    # Norms on what attention and MLP give alone.
    _own("Olmo2ForCausalLM", rows.QWEN3_ATTENTION, rows.PLAIN_MLP, rows.NORMS_BEHIND),
    _own("Olmo3ForCausalLM", rows.QWEN3_ATTENTION, rows.PLAIN_MLP, rows.NORMS_BEHIND),
    _own("Exaone4ForCausalLM", rows.QWEN3_ATTENTION, rows.PLAIN_MLP, rows.NORMS_BEHIND),
    _own("GraniteMoeHybridForCausalLM", rows.PLAIN_ATTENTION, rows.GRANITE_HYBRID_MLP),
    _own("InternLM3ForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP),
    _own("CwmForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP),
    _own("MinistralForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP),
    _own("Ministral3ForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP),
    _own("HunYuanDenseV1ForCausalLM", rows.HUNYUAN_ATTENTION, rows.PLAIN_MLP),
    _own(
        "PhiForCausalLM",
        rows.PHI_ATTENTION,
        rows.PHI_MLP,
        rows.ONE_NORM,
        norm_biases=True,
        last_norm="model.final_layernorm",
    ),
    # Its norms have no weights.
    _own("OlmoForCausalLM", rows.PLAIN_ATTENTION, rows.PLAIN_MLP, {}, last_norm=None),
    _with_gaps(_own("DeciLMForCausalLM", rows.LLAMA_ATTENTION, rows.LLAMA_MLP)),
    _own("Qwen2MoeForCausalLM", rows.QWEN2_ATTENTION, mixtures.QWEN2_MOE_MLP),
    _own("Glm4MoeForCausalLM", (*rows.QWEN2_ATTENTION, *_GLM4_MOE_NORMS), mixtures.DEEPSEEK_MLP),
    _own("Dots1ForCausalLM", rows.QWEN3_ATTENTION, mixtures.DEEPSEEK_MLP),
    _own("Ernie4_5_MoeForCausalLM", rows.PLAIN_ATTENTION, mixtures.ERNIE_MLP),
    _own("HunYuanMoEV1ForCausalLM", rows.HUNYUAN_ATTENTION, mixtures.HUNYUAN_MLP),
    _own("GraniteMoeSharedForCausalLM", rows.PLAIN_ATTENTION, mixtures.GRANITE_SHARED_MLP),
    _own("MiniMaxM2ForCausalLM", rows.QWEN3_ATTENTION, mixtures.MINIMAX_MLP),
    _own("PhiMoEForCausalLM", rows.LLAMA_ATTENTION, mixtures.MIXTRAL_MLP, norm_biases=True),
    _own("GptOssForCausalLM", rows.GPT_OSS_ATTENTION, mixtures.GPT_OSS_MLP),
    _own("Llama4ForCausalLM", rows.PLAIN_ATTENTION, mixtures.LLAMA4_MLP),
    _own("DeepseekV2ForCausalLM", rows.LATENT_ATTENTION, mixtures.DEEPSEEK_V2_MLP),
    _own("DeepseekV3ForCausalLM", rows.LATENT_ATTENTION, mixtures.DEEPSEEK_MLP),
    _own("Glm4MoeLiteForCausalLM", rows.LATENT_ATTENTION, mixtures.DEEPSEEK_MLP),
    _own("YoutuForCausalLM", rows.LATENT_ATTENTION, rows.PLAIN_MLP),
    _own("FlexOlmoForCausalLM", rows.QWEN3_ATTENTION, mixtures.QWEN_MOE_MLP, rows.NORMS_BEHIND),
    _own(
        "Qwen3NextForCausalLM",
        rows.QWEN3_NEXT_ATTENTION,
        mixtures.QWEN2_MOE_MLP,
        norm_recipe="plus_one",
    ),
    _own("Qwen3_5ForCausalLM", rows.QWEN3_5_ATTENTION, rows.PLAIN_MLP, norm_recipe="plus_one"),
    _own(
        "Qwen3_5MoeForCausalLM",
        rows.QWEN3_5_ATTENTION,
        mixtures.QWEN2_MOE_MLP,
        norm_recipe="plus_one",
    ),
    _with_layer_inputs(
        _own("Gemma4ForCausalLM", rows.GEMMA4_ATTENTION, mixtures.GEMMA4_MLP, rows.GEMMA2_NORMS)
    ),
    _with_streams(
        _own("Gemma3nForCausalLM", rows.GEMMA4_ATTENTION, rows.PLAIN_MLP, rows.GEMMA2_NORMS)
    ),
    _under(
        _own(
            "GPTNeoXForCausalLM",
            rows.NEOX_ATTENTION,
            rows.NEOX_MLP,
            norm_biases=True,
            last_norm="model.final_layer_norm",
        ),
        {
            "model.embed_tokens.": "gpt_neox.embed_in.",
            "model.": "gpt_neox.",
            "lm_head.": "embed_out.",
        },
    ),
)
ARCHITECTURES: dict[str, Architecture] = {
    family.name: family for family in (*_FAMILIES, *_OWN_FAMILIES)
}


# transformers' spellings, where released checkpoints and other runtimes have another.
_SPELLINGS = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


def usual_name(architecture: str) -> str:
    """The name that ARCHITECTURES has; itself where it is known under no other."""
    return _SPELLINGS.get(architecture, architecture)


def architecture_of(name: str) -> Architecture:
    """The family's tables; CheckpointError lists the supported ones."""
    name = usual_name(name)
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
    model lacks are left out, and rows of other layers; a tied lm_head reads the embedding.
    """
    architecture = architecture_of(config.architecture)
    first = [row for row in architecture.first_rows if pp_rank == 0 and row.when(config, 0)]
    found = [_of_streams(row, config) for row in first]
    for local, layer in enumerate(config.mapping.layers(pp_rank, config.num_hidden_layers)):
        found += [
            row._replace(
                target=row.target.format(local), sources=_layer_sources(row, layer, config)
            )
            for row in architecture.layer_rows
            if row.when(config, layer) and (not row.optional or _has_bias(config, row.target))
        ]
    if pp_rank == config.mapping.pp_size - 1:
        tied = config.tie_word_embeddings
        found += [
            row._replace(sources=architecture.first_rows[0].sources)
            if tied and row.target == "lm_head.weight"
            else _of_streams(row, config)
            for row in architecture.last_rows
            if row.when(config, config.num_hidden_layers - 1)
        ]
    return [row._replace(optional=False) for row in found]


def _layer_sources(row: TensorRow, layer: int, config: ModelConfig) -> tuple[str, ...]:
    experts = range(config.num_experts) if row.recipe == "experts" else range(1)
    return tuple(name.format(layer, expert=e) for e in experts for name in row.sources)


def _of_streams(row: TensorRow, config: ModelConfig) -> TensorRow:
    """Its sources for each stream but the first, where they are of streams."""
    streams = range(config.num_streams - 1)
    sources = (s.format(stream=i) if "{" in s else s for s in row.sources for i in streams or (0,))
    return row._replace(sources=tuple(dict.fromkeys(sources)))


_LAYER, _EXPERT = re.compile(r"\.layers\.\d+\."), re.compile(r"\.experts\.\d+\.")


def recipe_of(config: ModelConfig, sources: Sequence[str]) -> Recipe:
    """How a tensor is made of `sources`, which are all of its row, or others of those modules."""
    family = architecture_of(config.architecture)
    recipes = {row.sources[0]: row.recipe for row in (*family.layer_rows, *family.last_rows)}
    name = _EXPERT.sub(".experts.{expert}.", _LAYER.sub(".layers.{}.", sources[0]))
    weight = f"{name.rpartition('.')[0]}.weight"
    return recipes.get(name) or recipes.get(weight, "join")


def _has_bias(config: ModelConfig, name: str) -> bool:
    return config.mlp_bias if ".mlp." in name else config.attn_bias

"""Experts in a Hugging Face checkpoint where a family's own tensors hold all those of a layer.

| family | unquantised | quantised, ModelOpt's layout | compressed-tensors' |
| --- | --- | --- | --- |
| Llama 4 | `feed_forward.experts.gate_up_proj` | the same stack, one scale for all | one by one |
| GPT-OSS | `mlp.experts.gate_up_proj`, with biases | the same stack, one scale for all | none |
| Granite | `block_sparse_moe.input_linear.weight` | one by one, `experts.3.w1` | one by one |

One by one where a runtime's loader knows such names, a stack where quantisers write one. Knows
names and the order of rows, no file.
Source: nvidia-modelopt 0.47, torch/export; llm-compressor 0.14, modeling/moe; vLLM, llama4.py,
gpt_oss.py and granitemoe.py; TensorRT-LLM, fused_moe/quantization.py; SGLang, fused_moe_triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from enginehouse.build.families.architectures import architecture_of
from enginehouse.build.families.mixture_rows import RENAMED
from enginehouse.build.families.rows import Recipe, TensorRow
from enginehouse.build.forms.weight_forms import is_quantized
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import PlanError

# What ModelOpt writes a stack in: those whose scales a stack has a place for.
_STACKED_QUANTS = ("none", "fp8", "nvfp4", "w4a16_nvfp4")
# Families of which a runtime loads experts one by one, beside their own stacks.
_ALSO_ONE_BY_ONE = ("Llama4ForCausalLM",)
_GRANITE_WORDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_GRANITE_STACKS = {"mlp.fc.weight": "input_linear", "mlp.proj.weight": "output_linear"}


def has_turned_stacks(config: ModelConfig) -> bool:
    """Whether one tensor of the family holds all experts of a layer, inputs before outputs."""
    return any(row.recipe.startswith("turned") for row in _layer_rows(config))


def _layer_rows(config: ModelConfig) -> tuple[TensorRow, ...]:
    return architecture_of(config.architecture).layer_rows


def experts_share_scales(config: ModelConfig, settings: BuildSettings) -> bool:
    """Whether all experts of a layer have one scale of tensors, as a quantised stack has."""
    modelopt = settings.format == "hf" and settings.layout == "modelopt"
    return modelopt and has_turned_stacks(config)


def check_experts(settings: BuildSettings, config: ModelConfig) -> None:
    """PlanError for a form of stacked experts that no runtime loads from the layout, and for
    routers that are not what they were.
    """
    if config.num_experts and any(row.recipe == "router" for row in _layer_rows(config)):
        raise PlanError(
            f"a {config.architecture} with experts has factors of what enters its router, which an "
            "engine has multiplied into the router's weight, and format=hf would have to part; "
            "choose format=trtllm"
        )
    if not has_turned_stacks(config) or settings.quant == "none":
        return
    name = config.architecture
    if settings.layout == "compressed_tensors":
        if name not in _ALSO_ONE_BY_ONE:
            raise PlanError(
                f"layout=compressed_tensors with quant={settings.quant}: one tensor of a {name} "
                "holds all experts of a layer, and no runtime loads its experts one by one, as "
                "llm-compressor writes them; choose layout=modelopt with quant among "
                + ", ".join(_STACKED_QUANTS)
            )
    elif settings.quant not in _STACKED_QUANTS:
        other = ", or layout=compressed_tensors" if name in _ALSO_ONE_BY_ONE else ""
        raise PlanError(
            f"quant={settings.quant} with layout=modelopt: one tensor of a {name} holds all "
            "experts of a layer, which runtimes load in FP8 and NVFP4 alone; choose "
            f"{', '.join(_STACKED_QUANTS)}{other}"
        )


def hf_row(config: ModelConfig, row: TensorRow, layout: str) -> TensorRow:
    """A row of the family's table as the checkpoint has it: other names where experts stand
    otherwise than conversion reads them.
    """
    quantised = is_quantized(config.quantization, row.target)
    if config.architecture in RENAMED:
        return _granite_row(config.architecture, row, quantised)
    if not quantised or layout != "compressed_tensors" or not row.recipe.startswith("turned"):
        return row
    home = row.sources[0].rpartition(".")[0]
    words = ("up_proj", "gate_proj") if row.target.endswith("fc.weight") else ("down_proj",)
    experts = range(config.num_experts)
    names = tuple(f"{home}.{expert}.{word}.weight" for expert in experts for word in words)
    return row._replace(sources=names, recipe="experts")


def _granite_row(architecture: str, row: TensorRow, quantised: bool) -> TensorRow:
    for theirs, usual in RENAMED[architecture].items():
        if row.sources[0].endswith(usual):
            return row._replace(sources=(row.sources[0].removesuffix(usual) + theirs,))
    if row.recipe != "experts":
        return row
    layer = row.sources[0].partition("mlp.")[0]
    if not quantised:
        stack = next(word for end, word in _GRANITE_STACKS.items() if row.target.endswith(end))
        recipe: Recipe = "stacked_halves" if stack == "input_linear" else "stacked"
        return row._replace(sources=(f"{layer}block_sparse_moe.{stack}.weight",), recipe=recipe)
    names = []
    for source in row.sources:
        *_, number, word, _ = source.split(".")
        names.append(f"{layer}block_sparse_moe.experts.{number}.{_GRANITE_WORDS[word]}.weight")
    return row._replace(sources=tuple(names))


def is_stack(row: TensorRow) -> bool:
    return row.recipe == "pairs" or row.recipe.startswith(("turned", "stacked"))


def stacked(recipe: Recipe, experts: Tensor) -> Tensor:
    """Experts' weights or scales [experts, out, any], or biases [experts, out], in the order of the
    family's own stack. Of gate and up, up stands first here.
    """
    raw = experts.view(torch.uint8) if experts.dtype.itemsize == 1 else experts
    if recipe.endswith("halves"):
        raw = raw.roll(raw.shape[1] // 2, dims=1)
    if recipe.endswith("pairs"):
        up, gate = raw.chunk(2, dim=1)
        raw = torch.stack([gate, up], dim=2).flatten(1, 2)
    if recipe.startswith("turned"):
        raw = raw.mT.contiguous()
    return raw.view(experts.dtype)

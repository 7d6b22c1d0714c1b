"""Every spelling of a mixture's experts in a file -> the one that its family's table has.

    block_sparse_moe.experts.3.w1.weight [I, H]      Mixtral's own; gate w1, up w3, down w2
    mlp.experts.3.gate_proj.weight [I, H]            Qwen's; llm-compressor's for Mixtral
    mlp.experts.gate_up_proj [E, 2I, H]              transformers 5's: of each expert gate, then up
    mlp.experts.down_proj [E, H, I]
    block_sparse_moe.input_linear [E, 2I, H]         Granite's, beside router.layer
    block_sparse_moe.output_linear [E, H, I]

An expert of a stack is a run of the stack's bytes, so that nothing needs be read to part it.
Source: transformers 5, conversion_mapping.py (what it reads for these families).
"""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple

from enginehouse.build.families.mixture_rows import RENAMED
from enginehouse.build.families.shapes import Shape

_BLOCKS = ("block_sparse_moe", "mlp")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_QWEN = {short: long for long, short in _MIXTRAL.items()}
# A family's own block, and how it calls what others call otherwise.
_SPELLINGS: dict[str, tuple[str, dict[str, str]]] = {
    "MixtralForCausalLM": ("block_sparse_moe", _MIXTRAL),
    "Qwen3MoeForCausalLM": ("mlp", _QWEN),
    "OlmoeForCausalLM": ("mlp", _QWEN),
    "GraniteMoeForCausalLM": ("mlp", _QWEN),
    "GraniteMoeSharedForCausalLM": ("mlp", _QWEN),
    "MiniMaxM2ForCausalLM": ("block_sparse_moe", _MIXTRAL),
    "PhiMoEForCausalLM": ("block_sparse_moe", _MIXTRAL),
    **dict.fromkeys(
        (
            "Qwen2MoeForCausalLM",
            "Glm4MoeForCausalLM",
            "Dots1ForCausalLM",
            "Ernie4_5_MoeForCausalLM",
            "HunYuanMoEV1ForCausalLM",
            "FlexOlmoForCausalLM",
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "Glm4MoeLiteForCausalLM",
        ),
        ("mlp", _QWEN),
    ),
}
_BLOCK = re.compile(rf"((?:.*\.)?layers\.\d+\.)(?:{'|'.join(_BLOCKS)})\.(gate|experts)\.(.+)")
_ONE = re.compile(r"(\d+)\.(\w+)\.(.+)")


class Part(NamedTuple):
    """A tensor in a stored one. first: elements of it that lie before the part."""

    name: str
    first: int
    shape: Shape


def table_parts(architecture: str, name: str, shape: Shape) -> list[Part]:
    """What a stored tensor is to the family's table: itself under the table's name, or each
    expert's share of a stack.
    """
    for theirs, usual in RENAMED.get(architecture, {}).items():
        if name.endswith(theirs):
            name = name.removesuffix(theirs) + usual
    found = _BLOCK.fullmatch(name)
    if architecture not in _SPELLINGS or found is None:
        return [Part(name, 0, shape)]
    block, words = _SPELLINGS[architecture]
    layer, kind, rest = found.groups()
    home, one = f"{layer}{block}.{kind}.", _ONE.fullmatch(rest)
    if kind == "experts" and one is not None:
        expert, word, ending = one.groups()
        return [Part(f"{home}{expert}.{words.get(word, word)}.{ending}", 0, shape)]
    stacked = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(rest)
    if kind == "gate" or stacked is None or len(shape) != 3 or shape[1] % len(stacked):
        return [Part(f"{home}{rest}", 0, shape)]
    own = (shape[1] // len(stacked), shape[2])
    names = [
        f"{home}{expert}.{words.get(word, word)}.weight"
        for expert in range(shape[0])
        for word in stacked
    ]
    return [Part(name, place * prod(own), own) for place, name in enumerate(names)]

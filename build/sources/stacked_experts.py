"""Experts that a checkpoint holds one by one -> the stack that their family's table has.

    feed_forward.experts.3.gate_proj.weight [I, H]   llm-compressor's, of Llama 4
    mlp.experts.3.gate_proj.weight, .bias            its, of GPT-OSS
    experts.gate_up_proj [E, H, 2I], experts.down_proj [E, I, H], and biases

Their rows take turns in GPT-OSS's stack and follow each other in Llama 4's. Knows no quantisation.
Source: llm-compressor 0.14, modeling/moe/linear_experts.py and gpt_oss.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from enginehouse.build.source import TensorInfo, TensorSource
from enginehouse.runtime.errors import CheckpointError

_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_TAKING_TURNS = {"Llama4ForCausalLM": False, "GptOssForCausalLM": True}
Experts = dict[int, dict[str, str]]  # of a stack: of each number, the parts' words and names


def stacked_experts(stored: TensorSource, architecture: str) -> TensorSource:
    """`stored` with its experts as the family's table has them; itself where they stand so."""
    one_by_one = architecture in _TAKING_TURNS and any(map(_ONE.fullmatch, stored.infos))
    return StackedExperts(stored, _TAKING_TURNS[architecture]) if one_by_one else stored


class StackedExperts:
    """taking_turns: gate and up do so in the stack. A stack is made whole when it is read."""

    def __init__(self, stored: TensorSource, taking_turns: bool) -> None:
        self._stored = stored
        self._taking_turns = taking_turns

    @cached_property
    def _stacks(self) -> dict[str, Experts]:
        stacks: dict[str, Experts] = {}
        for name in self._stored.infos:
            if one := _ONE.fullmatch(name):
                home, number, word, kind = one.groups()
                stack = "down_proj" if word == "down" else "gate_up_proj"
                ending = "_bias" if kind == "bias" else ""
                experts = stacks.setdefault(f"{home}.{stack}{ending}", {})
                experts.setdefault(int(number), {})[word] = name
        return stacks

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """CheckpointError for a stack of which an expert, or a part of one, is missing, or whose
        experts differ in shape.
        """
        infos = {n: info for n, info in self._stored.infos.items() if not _ONE.fullmatch(n)}
        return infos | {name: self._info(name, experts) for name, experts in self._stacks.items()}

    def _info(self, name: str, experts: Experts) -> TensorInfo:
        words = ("down",) if ".down_proj" in name else ("gate", "up")
        of_all = [experts.get(n, {}).get(word) for n in range(max(experts) + 1) for word in words]
        shapes = {self._stored.infos[part].shape for part in of_all if part is not None}
        if None in of_all or len(shapes) != 1:
            raise CheckpointError(
                f"the experts that make {name} are not all there, or differ in shape "
                f"({max(experts) + 1} numbers, shapes {sorted(map(list, shapes))}): download the "
                "checkpoint again"
            )
        out_features, *inputs = shapes.pop()
        dtype = self._stored.infos[str(of_all[0])].dtype
        return TensorInfo(dtype, (max(experts) + 1, *inputs, len(words) * out_features))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        experts = self._stacks.get(name)
        if experts is None:
            return self._stored.read(name, rows)
        numbers = sorted(experts)[rows or slice(None)]
        return torch.stack([self._one(experts[number]) for number in numbers])

    def _one(self, parts: Mapping[str, str]) -> Tensor:
        """An expert's part of a stack: [in, out], or [out] of biases."""
        read = {word: self._stored.read(name) for word, name in parts.items()}
        if "down" in read:
            return read["down"].T if read["down"].ndim == 2 else read["down"]
        pair = [read["gate"], read["up"]]
        rows = torch.stack(pair, dim=1).flatten(0, 1) if self._taking_turns else torch.cat(pair)
        return rows.T if rows.ndim == 2 else rows

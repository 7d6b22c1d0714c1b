"""The states of linear attention: a slot for each sequence that runs, and how one step goes on.

Which slot is whose is `BlockMemory`'s business. What is in a slot that begins is nobody's.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.batching.sequence import Chunk
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.machine.device import index_tensor
from enginehouse.runtime.torch.linear_attention import DeltaRule, Past


class StateCache:
    """layers: of each layer with linear attention what all slots hold."""

    def __init__(
        self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers = () if config.delta is None else sorted(config.delta.layers)
        self.device = device
        self.layers = {
            layer: Past.none(config.delta, num_slots, dtype, device)
            for layer in layers
            if config.delta is not None
        }

    @property
    def num_bytes(self) -> int:
        return sum(held.nbytes for past in self.layers.values() for held in past)

    def read(self, layer: int, run: StateRun) -> Past:
        inputs, states = (held[run.slots] for held in self.layers[layer])
        inputs[run.begins] = 0
        states[run.begins] = 0
        return Past(inputs, states)

    def write(self, layer: int, run: StateRun, past: Past) -> None:
        for held, new in zip(self.layers[layer], past, strict=True):
            held[run.slots] = new


class StateRun(NamedTuple):
    """Sequences that go on by equally many tokens. rows: int64 [sequences, tokens], theirs in the
    step; slots: int64 [sequences]; begins: bool [sequences], whether nothing was before.
    """

    rows: Tensor
    slots: Tensor
    begins: Tensor


def state_runs(cache: StateCache, chunks: list[Chunk]) -> list[StateRun]:
    """All decodes at once, and each other chunk by itself; none where no layer has a state."""
    if not cache.layers:
        return []
    ends = accumulate((chunk.num_tokens for chunk in chunks), initial=0)
    placed = list(zip(ends, chunks, strict=False))
    decodes = [each for each in placed if each[1].num_tokens == 1]
    others = [[each] for each in placed if each[1].num_tokens > 1]
    return [_run(cache, group) for group in (decodes, *others) if group]


def _run(cache: StateCache, group: list[tuple[int, Chunk]]) -> StateRun:
    device = cache.device
    rows = [list(range(first, first + chunk.num_tokens)) for first, chunk in group]
    return StateRun(
        torch.tensor(rows, device=device),
        index_tensor([chunk.sequence.slot for _, chunk in group], device),
        torch.tensor([chunk.start == 0 for _, chunk in group], device=device),
    )


def recur(
    cache: StateCache,
    runs: list[StateRun],
    layer: int,
    rule: DeltaRule,
    mixed: Tensor,
    decay: Tensor,
    rate: Tensor,
) -> Tensor:
    """float32 [tokens, key_heads, group, value_size] of a step's tokens, whose slots go on."""
    delta = rule.delta
    out = decay.new_empty(len(mixed), delta.key_heads, delta.group, delta.value_size)
    for run in runs:
        past = cache.read(layer, run)
        out[run.rows], past = rule(mixed[run.rows], decay[run.rows], rate[run.rows], past)
        cache.write(layer, run, past)
    return out

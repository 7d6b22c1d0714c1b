"""A model filled up with zeros so that it can be cut: heads, KV heads and columns of the MLP.

    9 heads, 3 KV heads -> 12 and 4        q0 q1 q2 | q3 q4 q5 | q6 q7 q8 | 0  0  0
                                             k0         k1         k2        0

A head stays with its KV head, so that added ones stand at the end of their group, and added groups
at the end of all. What is added has zero rows in qkv and zero columns in dense, the MLP's likewise:
no output changes. Works on whole tensors by their TensorRT-LLM names, whatever they hold (weights,
packed nibbles, scales), as `sharding.py` cuts them afterwards. What a model is padded to is
plan/cuts.py's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.config import ModelConfig

NOTHING = -1  # in an order: a place that was added

_MATRICES = ("weight", "weights_scaling_factor")
_OF_ROWS = ("bias", "per_channel_scale", "sinks")
_OF_COLUMNS = ("prequant_scaling_factor",)
# Of a tensor that is multiplied with the others, what is added is one: a legal scale.
_FACTORS = ("weights_scaling_factor", "per_channel_scale", "prequant_scaling_factor")


class Order(NamedTuple):
    """An axis of a whole tensor: how long it was, and which of its elements stands where now."""

    before: int
    now: Tensor  # int64 [after], NOTHING where it was added

    def is_aligned(self, unit: int) -> bool:
        """Whether runs of `unit` elements stay whole: what shares a byte or a scale."""
        if self.before % unit or len(self.now) % unit:
            return False
        runs = self.now.view(-1, unit)
        kept = runs == runs[:, :1] + torch.arange(unit)
        first = runs[:, :1]
        return bool(((kept & (first % unit == 0)) | ((runs < 0) & (first < 0))).all())

    def of_runs(self, unit: int) -> Tensor:
        """The order of those runs, [after / unit]."""
        assert self.is_aligned(unit), unit
        first = self.now.view(-1, unit)[:, 0]
        return torch.where(first < 0, NOTHING, first // unit)

    def back(self) -> Tensor:
        """Where each element that there was stands now, [before]."""
        places = torch.empty(self.before, dtype=torch.int64)
        kept = self.now >= 0
        places[self.now[kept]] = torch.arange(len(self.now))[kept]
        return places


@dataclass(frozen=True)
class Padding:
    """rows, columns: the axes of linears that are filled up, by the last word of their name.

    experts: whether the MLP's tensors are a mixture's, whose FP8 scales are one for each expert.
    """

    rows: Mapping[str, Order] = field(default_factory=dict)
    columns: Mapping[str, Order] = field(default_factory=dict)
    experts: bool = False

    def applies(self, name: str) -> bool:
        """Whether a tensor of a decoder's linear is changed at all."""
        word = _words(name)[0]
        return word in self.rows or word in self.columns

    def pad(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor by its TensorRT-LLM name, filled up; itself where nothing is added."""
        word, kind = _words(name)
        if not self.applies(name) or (kind == "weights_scaling_factor" and self.experts):
            return tensor
        if kind == "zero":  # [groups, out]
            return _filled(_filled(tensor, 1, self.rows.get(word)), 0, self.columns.get(word))
        fill = 1.0 if kind in _FACTORS else 0.0
        if kind in _MATRICES and tensor.ndim > 1:
            tensor = _filled(tensor, tensor.ndim - 2, self.rows.get(word), fill)
            return _filled(tensor, tensor.ndim - 1, self.columns.get(word), fill)
        if kind in _OF_ROWS:
            return _filled(tensor, tensor.ndim - 1, self.rows.get(word), fill)
        return _filled(tensor, 0, self.columns.get(word), fill) if kind in _OF_COLUMNS else tensor

    def unpad(self, name: str, weight: Tensor) -> Tensor:
        """The weight that `pad` made this of."""
        word, _ = _words(name)
        for dim, order in ((-2, self.rows.get(word)), (-1, self.columns.get(word))):
            if order is not None:
                weight = weight.index_select(dim, order.back().to(weight.device))
        return weight

    def keeps_groups(self, group_size: int) -> bool:
        """Whether INT4 that was packed before can be filled up: no group of inputs and no pair of
        rows is parted.
        """
        columns = all(order.is_aligned(group_size) for order in self.columns.values())
        return columns and all(order.is_aligned(2) for order in self.rows.values())


NO_PADDING = Padding()


def _words(name: str) -> tuple[str, str]:
    """`transformer.layers.3.mlp.proj.weight` -> its module's last word, and its own."""
    *_, module, kind = ["", *name.split(".")]
    return module, kind


def _filled(tensor: Tensor, dim: int, order: Order | None, fill: float = 0.0) -> Tensor:
    if order is None:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:  # which torch neither copies nor selects by index
        return _filled(tensor.view(torch.uint8), dim, order).view(tensor.dtype)
    now = order.of_runs(order.before // tensor.shape[dim]).to(tensor.device)
    shape = list(tensor.shape)
    shape[dim] = len(now)
    kept = now >= 0
    places = torch.arange(len(now), device=now.device)[kept]
    return tensor.new_full(shape, fill).index_copy_(
        dim, places, tensor.index_select(dim, now[kept])
    )


def padding_of(before: ModelConfig, after: ModelConfig, repeat_queries: bool = False) -> Padding:
    """How a model's tensors become those of `after`, which has more heads, KV heads or columns.

    Where `after` has the same heads on more KV heads, these are repeated (`_kv_order`).
    repeat_queries: an added head asks what the last of its group asks, instead of nothing.
    """
    rows: dict[str, Order] = {}
    columns: dict[str, Order] = {}
    size = before.head_size
    heads = (before.num_attention_heads, before.num_key_value_heads)
    if (after.num_attention_heads, after.num_key_value_heads) != heads:
        query, keys = _query_order(before, after), _kv_order(before, after)
        asked = _repeated(query, after) if repeat_queries else query
        # of q, k and v, which lie one below the other
        places = [asked, _moved(keys, heads[0]), _moved(keys, heads[0] + heads[1])]
        rows["qkv"] = _elements(sum(places, []), heads[0] + 2 * heads[1], size)
        columns["dense"] = _elements(query, heads[0], size)
        rows["attention"] = _elements(query, heads[0])  # a number for each
    inner, wanted = before.moe_intermediate_size, after.moe_intermediate_size
    if wanted != inner:
        one = [*range(inner), *[NOTHING] * (wanted - inner)]
        halves = [*one, *_moved(one, inner)] if before.gate_in_fc else one
        rows["fc"] = _elements(halves, inner * (2 if before.gate_in_fc else 1))
        rows["gate"] = _elements(one, inner)
        columns["proj"] = _elements(one, inner)
    return Padding(rows, columns, before.num_experts > 0)


def _query_order(before: ModelConfig, after: ModelConfig) -> list[int]:
    """Which head stands at each place: those of a KV head, then what fills its group up."""
    share = before.num_attention_heads // before.num_key_value_heads
    group = after.num_attention_heads // after.num_key_value_heads
    if group < share:  # the KV heads were repeated, and their heads parted among the copies
        return list(range(before.num_attention_heads))
    places = [
        kv * share + i if kv < before.num_key_value_heads and i < share else NOTHING
        for kv in range(after.num_key_value_heads)
        for i in range(group)
    ]
    return places


def _kv_order(before: ModelConfig, after: ModelConfig) -> list[int]:
    count, wanted = before.num_key_value_heads, after.num_key_value_heads
    if after.num_attention_heads // wanted < before.num_attention_heads // count:
        copies = wanted // count
        return [place // copies for place in range(wanted)]
    return [*range(count), *[NOTHING] * (wanted - count)]


def _repeated(query: Sequence[int], after: ModelConfig) -> list[int]:
    """The order with the group's last head in place of each that was added to a real group."""
    group = after.num_attention_heads // after.num_key_value_heads
    starts = range(0, len(query), group)
    lasts = [max(query[start : start + group]) for start in starts]
    return [lasts[i // group] if head < 0 else head for i, head in enumerate(query)]


def _moved(places: Sequence[int], by: int) -> list[int]:
    return [place if place < 0 else place + by for place in places]


def _elements(places: Sequence[int], before: int, size: int = 1) -> Order:
    """The order of elements, of which each place has `size`."""
    heads = torch.tensor(places).unsqueeze(1)
    now = torch.where(heads < 0, NOTHING, heads * size + torch.arange(size))
    return Order(before * size, now.flatten())

"""Into which plans a decoder is cut: one plan of it all, or parts of which some serve many layers.

The compiler's time grows faster than the number of layers, and weights are inputs: a plan of a
few layers serves every stretch of layers that is like it. Knows no compiler.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.tensorrt.network import NetworkPart, whole_decoder
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.tensorrt.inputs import layer_of, shift_layer

_WHOLE_LAYERS = 32  # more of them take the compiler half a minute and longer
_LEAST_LAYERS, _MOST_LAYERS = 4, 10


class PlanPart(NamedTuple):
    """A part of the decoder, and the first part that is like it: their plan is one."""

    part: NetworkPart
    like: NetworkPart


def cut_decoder(
    config: ModelConfig, plan_layers: int | None = None, shared: bool = True
) -> list[PlanPart]:
    """The parts in the order in which they run; their layers, one after another, are the model's.

    plan_layers: layers in one plan; None: all of them up to 32, else the number from 4 to 10 that
    needs the fewest plans, and of those the largest. shared False: no two parts have one plan, as
    each holds its weights.
    """
    count = config.num_hidden_layers
    if plan_layers is None and count > _WHOLE_LAYERS:
        sizes = range(_LEAST_LAYERS, _MOST_LAYERS + 1)
        kinds = _layer_kinds(config)
        plan_layers = min(sizes, key=lambda size: (len(set(_stretches(kinds, size))), -size))
    if plan_layers is None or plan_layers >= count:
        whole = whole_decoder(config)
        return [PlanPart(whole, whole)]
    parts = [NetworkPart(0, 0, True, False)]
    for first in range(0, count, plan_layers):
        parts.append(NetworkPart(first, min(plan_layers, count - first), False, False))
    parts.append(NetworkPart(count, 0, False, True))
    if not shared:
        return [PlanPart(part, part) for part in parts]
    layers = _stretches(_layer_kinds(config), plan_layers)
    stretches: list[Hashable] = ["embedding", *layers, "head"]
    return [
        PlanPart(part, parts[stretches.index(stretch)])
        for part, stretch in zip(parts, stretches, strict=True)
    ]


def _stretches(kinds: list[Hashable], size: int) -> list[Hashable]:
    return [tuple(kinds[first : first + size]) for first in range(0, len(kinds), size)]


def _layer_kinds(config: ModelConfig) -> list[Hashable]:
    """What tells layers apart: how they attend, which rotary table, what tensors they have."""
    traits = traits_of(config)
    tensors: list[list[Hashable]] = [[] for _ in range(config.num_hidden_layers)]
    for name, tensor in output_tensors(config, 0).items():
        layer = layer_of(name)
        if layer is not None:
            tensors[layer].append((shift_layer(name, -layer), tensor))
    return list(zip(traits.rules, traits.ropes, map(tuple, tensors), strict=True))

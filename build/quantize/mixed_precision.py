"""Which form each linear gets of MIXED_PRECISION: by what it loses alone, and what it takes.

Linears that share an input, and all experts of a layer, are rounded together, all else as it is,
and the model goes on from there to its logits: their KL divergence is what that costs. Costs are
added up, as if none changed another; bits are spent where they save most. Knows no layout and no
file.
Source: the criterion of nvidia-modelopt's auto_quantize with method kl_div, and its effective bits;
the choice is the convex hull's greedy one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.forms.block_floats import NVFP4_BLOCK, dequantize_blocks
from enginehouse.build.forms.block_quantization import (
    nvfp4_round_trip,
    nvfp4_second_scale,
    quantize_nvfp4,
)
from enginehouse.build.forms.quantization import fp8_scale
from enginehouse.build.quantize.layerwise import SHARED_INPUTS
from enginehouse.build.quantize.reference import ReferenceModel, fast_products
from enginehouse.runtime.checkpoint.packing import to_fp8
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.torch.decoder import PREFIX, DecoderLayer, causal_attention
from enginehouse.runtime.torch.linear import Linear

MODULES = tuple(name for shared in SHARED_INPUTS for name in shared)
MAX_TOKENS = 256  # of the calibration text, that the linears are tried on
UNQUANTISED = "none"
# Bits of a weight, scales of blocks included.
BITS = {"nvfp4": 4.5, "w4a16_nvfp4": 4.5, "fp8": 8.0, UNQUANTISED: 16.0}


class Rounding(NamedTuple):
    """float32 to float32: a weight [out, in] and what enters it [tokens, in], to the nearest."""

    weight: Callable[[Tensor], Tensor]
    entering: Callable[[Tensor], Tensor]


def _fp8(values: Tensor) -> Tensor:
    scale = fp8_scale(float(values.abs().amax()))
    return to_fp8(values / scale).float().mul_(scale)


def _nvfp4(weight: Tensor) -> Tensor:
    q, scale, second = quantize_nvfp4(weight.cpu())
    return dequantize_blocks(q, scale, NVFP4_BLOCK, second).to(weight.device)


def _nvfp4_entering(x: Tensor) -> Tensor:
    return nvfp4_round_trip(x, nvfp4_second_scale(float(x.abs().amax())))


ROUNDINGS = {
    "nvfp4": Rounding(_nvfp4, _nvfp4_entering),
    "w4a16_nvfp4": Rounding(_nvfp4, lambda x: x),
    "fp8": Rounding(_fp8, _fp8),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share an input, or a layer's experts. modules: `transformer.layers.3.mlp.fc`.
    kl: of each form, mean nats a token.
    """

    modules: tuple[str, ...]
    num_weights: int
    kl: Mapping[str, float]


class Choice(NamedTuple):
    """forms: of each module that is quantised. bits: of a weight, the mean. kl: the sum."""

    forms: dict[str, str]
    bits: float
    kl: float


class _RoundedLayer(DecoderLayer):
    """A decoder layer of which some linears round what enters them."""

    rounded: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def _run(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        entering = self.rounded.get(name)
        return super()._run(name, linear, x if entering is None else entering(x))


@torch.inference_mode()
def measure_groups(
    reference: ReferenceModel,
    ids: Tensor,
    forms: Sequence[str],
    left_out: Callable[[str], bool],
    advance: Callable[[int], None],
) -> list[Group]:
    """Every group of linears of the decoder that is not left out, and what each form costs it.

    The first form's cost is measured at the logits; another's is that times the ratio of what the
    two change in what the layer gives, in squares. ids: int64 [tokens]. advance(1) after each
    layer. Memory: one layer in float32 twice, and 4 states of the tokens for each layer.
    """
    config, traits = reference.config, reference.traits
    rotary = reference.rotary(len(ids))
    truth = reference.embedded([ids])[0]
    changed: list[Tensor] = []  # what each group's first form makes of the states
    found: list[tuple[tuple[str, ...], int, dict[str, float]]] = []
    with fast_products():
        for index in range(config.num_hidden_layers):
            tensors = reference.tensors(PREFIX.format(index))
            rope = traits.ropes[index]
            positions = torch.arange(len(ids), device=reference.device)
            angles = rotary.of(rope, positions)

            def run(layer: DecoderLayer, states: Tensor) -> Tensor:
                return layer(index, states, angles, causal_attention)  # noqa: B023

            plain = DecoderLayer(config, tensors, torch.float32)
            changed = [run(plain, states) for states in changed]
            after = run(plain, truth)
            for names in _groups(tensors):
                modules = tuple(PREFIX.format(index) + name for name in names)
                if any(map(left_out, modules)):
                    continue
                errors: dict[str, float] = {}
                for form in forms:
                    states = run(_rounded_layer(reference, tensors, names, form), truth)
                    errors[form] = float((states - after).square().sum())
                    if form == forms[0]:
                        changed.append(states)
                size = sum(tensors[f"{name}.weight"].numel() for name in names)
                found.append((modules, size, errors))
            truth = after
            advance(1)
    wanted = reference.logits([truth])[0].log_softmax(-1)
    groups = []
    for (modules, size, errors), states in zip(found, changed, strict=True):
        logits = reference.logits([states])[0].log_softmax(-1)
        divergence = float((wanted.exp() * (wanted - logits)).sum(-1).mean())
        first = errors[forms[0]] or 1.0
        kl = {form: max(0.0, divergence) * errors[form] / first for form in forms}
        groups.append(Group(modules, size, {**kl, UNQUANTISED: 0.0}))
    return groups


def _groups(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Linears that have one form: those that share an input, and all experts of a layer, which
    runtimes run as one.
    """
    weights = {name: tensors[f"{name}.weight"] for name in MODULES if f"{name}.weight" in tensors}
    mixture = tuple(name for name, weight in weights.items() if weight.ndim == 3)
    groups = [
        tuple(n for n in shared if n in weights and n not in mixture) for shared in SHARED_INPUTS
    ]
    return [group for group in (*groups, mixture) if group]


def _rounded_layer(
    reference: ReferenceModel, tensors: Mapping[str, Tensor], names: Sequence[str], form: str
) -> DecoderLayer:
    rounding = ROUNDINGS[form]
    weights = [tensors[f"{name}.weight"] for name in names]
    if weights[0].ndim == 3:
        whole = [torch.stack([rounding.weight(expert) for expert in weight]) for weight in weights]
    else:
        sizes = [len(weight) for weight in weights]
        whole = list(rounding.weight(torch.cat(weights)).split(sizes))
    rounded = {f"{name}.weight": part for name, part in zip(names, whole, strict=True)}
    layer = _RoundedLayer(reference.config, {**tensors, **rounded}, torch.float32)
    layer.rounded = dict.fromkeys(names, rounding.entering)
    return layer


def choose_forms(
    groups: Sequence[Group], effective_bits: float | None, max_kl: float | None
) -> Choice:
    """The forms that lose least with at most `effective_bits` bits a weight, or take least with a
    KL of at most `max_kl`; one of the two is given.

    Raises PlanError for fewer bits than the smallest form has, and where nothing is quantised.
    """
    ladders = [_ladder(group) for group in groups]
    at = [0] * len(groups)
    weights = sum(group.num_weights for group in groups)
    lowest = [(group, ladder[0]) for group, ladder in zip(groups, ladders, strict=True)]
    bits = sum(BITS[form] * group.num_weights for group, form in lowest)
    kl = sum(group.kl[form] for group, form in lowest)
    if effective_bits is not None and bits > effective_bits * weights:
        raise PlanError(
            f"effective_bits={effective_bits:g} is below the {bits / weights:g} of the smallest "
            f"form; choose at least {bits / weights:g}"
        )
    steps = sorted(
        (-_gain(group, low, high), i, rung)
        for i, (group, ladder) in enumerate(zip(groups, ladders, strict=True))
        for rung, (low, high) in enumerate(pairwise(ladder))
    )
    for _, i, rung in steps:
        if max_kl is not None and kl <= max_kl:
            break
        group, low, high = groups[i], ladders[i][rung], ladders[i][rung + 1]
        cost = (BITS[high] - BITS[low]) * group.num_weights
        fits = effective_bits is None or bits + cost <= effective_bits * weights
        if at[i] == rung and fits:
            at[i], bits, kl = rung + 1, bits + cost, kl + group.kl[high] - group.kl[low]
    chosen = [ladder[rung] for ladder, rung in zip(ladders, at, strict=True)]
    forms = {
        module: form
        for group, form in zip(groups, chosen, strict=True)
        if form != UNQUANTISED
        for module in group.modules
    }
    if not forms:
        raise PlanError(f"max_kl={max_kl:g} leaves no linear quantised; choose more, or quant=none")
    return Choice(forms, bits / weights, max(0.0, kl))


def _ladder(group: Group) -> list[str]:
    """The forms on the lower convex hull of bits and KL, fewest bits first."""
    best: dict[float, str] = {}
    for form in sorted(group.kl, key=lambda form: group.kl[form]):
        best.setdefault(BITS[form], form)
    hull: list[str] = []
    for form in (best[bits] for bits in sorted(best)):
        while len(hull) > 1 and _gain(group, hull[-2], hull[-1]) <= _gain(group, hull[-1], form):
            hull.pop()
        hull.append(form)
    return hull


def _gain(group: Group, low: str, high: str) -> float:
    """What a bit saves of the KL between two forms."""
    return (group.kl[low] - group.kl[high]) / ((BITS[high] - BITS[low]) * group.num_weights)

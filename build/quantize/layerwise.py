"""The calibration text through the model, layer by layer: each is quantised on what the layers
before it now give.

Asked for one layer at a time, in order. Within a layer too, a linear's inputs are those that the
quantised linears before it produce; what they should have been is kept beside them. Memory: one
layer in float32, two second moments of a linear's inputs, the calibration set's activations
twice, and the inputs of one layer's linears in bfloat16.
Source: sequential calibration as in GPTQ (Frantar et al., 2023), section 4; the unquantised
model's outputs as the aim as in GPTAQ (Li et al., 2025).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from enginehouse.build.forms.padding import NO_PADDING, Padding
from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.compensation import InputMoments
from enginehouse.build.quantize.layer_errors import STATES, ErrorLog
from enginehouse.build.quantize.reference import ReferenceModel, fast_products
from enginehouse.runtime.checkpoint.rope import Angles
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.decoder import (
    PREFIX,
    CausalAttention,
    DecoderLayer,
    causal_attention,
)
from enginehouse.runtime.torch.linear import Linear
from enginehouse.runtime.torch.moe import ExpertMlp

# Linears that share an input, and so its factors; in the order in which a layer runs them.
SHARED_INPUTS = (
    ("attention.qkv",),
    ("attention.q_a", "attention.q", "attention.kv_a"),
    ("attention.q_b",),
    ("attention.dense",),
    ("linear_attention.in_qkvz",),
    ("linear_attention.dense",),
    ("mlp.fc", "mlp.gate"),
    ("mlp.proj",),
    ("mlp.shared_expert.fc",),
    ("mlp.shared_expert.proj",),
)


def is_excluded(config: ModelConfig, layer: int, module: str) -> bool:
    """Whether a linear of a layer of the whole model stays as it is: patterns know a layer by its
    number in its pipeline stage.
    """
    for pp_rank in range(config.mapping.pp_size):
        layers = config.mapping.layers(pp_rank, config.num_hidden_layers)
        if layer in layers:
            return config.quantization.excludes(PREFIX.format(layer - layers.start) + module)
    raise AssertionError(layer)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Linears that share an input as one, [out, in]; one alone as it is."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


class _Seen(Exception):
    """The linear that was waited for has been shown its input: the rest can be spared."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What enters the linears that share an input: sums, none for experts, each of which sees a
    part of it; and each channel's largest magnitude, [in], or each expert's, [experts, in], zeros
    for one that saw no token.
    """

    moments: InputMoments | None
    largest: Tensor


class _SeenLayer(DecoderLayer):
    """A layer that shows what enters `module`, and the number of the expert that it enters."""

    module = ""
    see: Callable[[Tensor, int], None]

    def _run(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        if name == self.module:
            self.see(x, self._experts.get(id(linear), 0))
        return super()._run(name, linear, x)

    @cached_property
    def _experts(self) -> dict[int, int]:
        if not isinstance(self.mlp, ExpertMlp):
            return {}
        pairs = (enumerate(linears) for linears in (self.mlp.fc, self.mlp.proj))
        return {id(linear): number for pair in pairs for number, linear in pair}


class LayerwiseWalk(ABC):
    """Satisfies `units.LayerLinears`. Layers must be asked for in order, each once; those that are
    not asked for are quantised too, and not given out.

    form: of the linears that are being settled. one_scale: all experts of a layer share the scale
    of their tensors, and of what enters them.

    layer: the one it stands before. An earlier run's activations are gone on with when they stand
    at `first`, the first layer that is still wanted, or before it.

    The model runs as it is; what is given out is padded, and the same but for groups of INT4 that
    lie otherwise.
    """

    def __init__(
        self,
        config: ModelConfig,
        reference: ReferenceModel,
        sequences: Sequence[Tensor],
        saved: SavedActivations,
        first: int = 0,
        padding: Padding = NO_PADDING,
        one_scale: bool = False,
    ) -> None:
        self.config = config
        self.form = config.quantization
        self.padding = padding
        self.one_scale = one_scale
        self.errors: ErrorLog | None = None  # where it is told how far each layer's output is
        self.unseen = 0  # experts that no token entered and whose inputs have scales of their own
        self.reference = reference
        self.saved = saved
        self._rotary = reference.rotary(max(len(ids) for ids in sequences))
        earlier = saved.load()
        if earlier is not None and earlier.layer <= first:
            self.layer = earlier.layer
            states = [item.to(reference.device) for item in earlier.hidden]
            self._hidden, self._truth = states[: len(sequences)], states[len(sequences) :]
        else:
            self.layer, self._hidden = 0, reference.embedded(sequences)
            # the same, in the unquantised model; clones, as both are saved
            self._truth = [states.clone() for states in self._hidden]
        # Of each sequence: what attention gave stands once a layer's q, k and v are settled, and
        # what enters the MLP once dense is.
        self._attended: dict[int, Tensor] = {}
        self._middle: dict[int, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, layer: int) -> dict[str, Tensor]:
        """The checkpoint's tensors of the layer's quantised linears, whole, by module; on the CPU,
        wherever the reference runs.
        """
        assert layer >= self.layer, f"layer {layer} asked for after {self.layer - 1}"
        with fast_products():
            for unquantised in range(self.layer, layer):
                self._quantize(unquantised, self.reference.tensors(PREFIX.format(unquantised)))
            self.layer = layer
            self.saved.save(layer, [*self._hidden, *self._truth])
            result = self._quantize(layer, self.reference.tensors(PREFIX.format(layer)))
        self.layer = layer + 1
        return {name: tensor.cpu() for name, tensor in result.items()}

    def _quantize(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's quantised tensors; carries both kinds of activations through it."""
        truths = self._run_unquantised(layer, tensors)
        result: dict[str, Tensor] = {}
        for shared in SHARED_INPUTS:
            modules = [name for name in shared if f"{name}.weight" in tensors]
            if not modules or is_excluded(self.config, layer, modules[0]):
                continue
            self.form = self.config.quantization.of(PREFIX.format(layer) + modules[0])
            inputs = self._inputs(layer, tensors, modules[0], truths.pop(modules[0], []))
            weights = [tensors[f"{module}.weight"] for module in modules]
            stored, meant = self._settle(modules, weights, inputs)
            result |= stored
            for module, weight in zip(modules, meant, strict=True):
                tensors[f"{module}.weight"] = weight
        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        for i in range(len(self._hidden)):
            middle = self._enter_mlp(layer, decoder, i)
            self._hidden[i] = decoder.feed_forward(layer, self._hidden[i], middle)
        self._attended.clear()
        self._middle.clear()
        if self.errors is not None:
            self.errors.add(STATES, layer, "", *self._error())
        return result

    def _error(self) -> tuple[float, float]:
        """Over all tokens the squared distance from the truth relative to it, and their number:
        each counts alike, as a few tokens' states are far larger than all others'.
        """
        pairs = list(zip(self._hidden, self._truth, strict=True))
        ratios = [(found - true).norm(dim=-1) / true.norm(dim=-1) for found, true in pairs]
        error = sum(float(ratio.square().sum()) for ratio in ratios)
        return error, float(sum(len(ratio) for ratio in ratios))

    @abstractmethod
    def _settle(
        self, modules: Sequence[str], weights: Sequence[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """The checkpoint's tensors of linears that share an input, by name and padded, and the
        weights in float32 that they stand for, without padding.
        """

    def _entering(self, x: Tensor, largest: float) -> Tensor:
        """x as it enters the product, where the form rounds it: by its largest magnitude."""
        return x

    def _run_unquantised(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """What enters each module but experts, sequence by sequence, in bfloat16 (they are
        differences' small part); the truth is one layer further.
        """
        seen: dict[str, list[Tensor]] = {}

        def observe(name: str, x: Tensor) -> None:
            if tensors[f"{name}.weight"].ndim == 2:
                seen.setdefault(name, []).append(x.bfloat16())

        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        decoder.observe = observe
        for i, states in enumerate(self._truth):
            self._truth[i] = decoder(layer, states, self._angles(layer, states), causal_attention)
        return seen

    def _inputs(
        self, layer: int, tensors: dict[str, Tensor], module: str, truths: list[Tensor]
    ) -> Inputs:
        """What enters `module` when the layer runs with `tensors`, and what should."""
        weight = tensors[f"{module}.weight"]
        *experts, _, in_features = weight.shape
        largest = torch.zeros(*experts, in_features, device=self.reference.device)
        seen: list[Tensor] = []

        def see(x: Tensor, expert: int) -> None:
            place = largest[expert] if experts else largest
            torch.maximum(place, x.abs().amax(0), out=place)
            if truths:
                seen.append(x)
                raise _Seen

        decoder = _SeenLayer(self.reference.config, tensors, torch.float32)
        decoder.see = see
        peak = max((float(truth.abs().amax()) for truth in truths), default=0.0)
        moments = InputMoments(in_features, self.reference.device) if truths else None
        for i in range(len(self._hidden)):
            middle = self._enter_mlp(layer, decoder, i) if module.startswith("mlp.") else None
            decoder.module = module
            try:
                if middle is None:
                    self._attend(layer, decoder, i)
                else:
                    decoder.feed_forward(layer, self._hidden[i], middle)
            except _Seen:
                pass
            decoder.module = ""
            if moments is not None:
                moments.add(self._entering(seen[0], peak), truths[i])
            seen.clear()
        return Inputs(moments, largest)

    def _angles(self, layer: int, states: Tensor) -> Angles:
        rope = self.reference.traits.ropes[layer]
        return self._rotary.of(rope, torch.arange(len(states), device=states.device))

    def _attend(self, layer: int, decoder: DecoderLayer, sequence: int) -> Tensor:
        """The layer's first half, with the attention of an earlier time if there is one."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
            if sequence not in self._attended:
                self._attended[sequence] = causal_attention(layer, q, k, v, rule)
            return self._attended[sequence]

        states = self._hidden[sequence]
        return decoder.attend(layer, states, self._angles(layer, states), CausalAttention(attend))

    def _enter_mlp(self, layer: int, decoder: DecoderLayer, sequence: int) -> Tensor:
        """What the first half gives, computed once, when its linears are settled."""
        if sequence not in self._middle:
            self._middle[sequence] = self._attend(layer, decoder, sequence)
        return self._middle[sequence]

"""AWQ through the whole model: each layer is quantised on what the layers before it now give.

Asked for one layer at a time, in order. Within a layer too, a linear's inputs are those that the
quantised linears before it produce; what they should have been is kept beside them. Memory: one
layer in float32, two second moments of a linear's inputs, the calibration set's activations
twice, and the inputs of one layer's linears in bfloat16.
Source: AWQ (Lin et al., 2023); sequential calibration as in GPTQ (Frantar et al., 2023), section
4; the unquantised model's outputs as the aim as in GPTAQ (Li et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.activations import SavedActivations
from enginehouse.build.awq import AwqLinear, quantize_awq
from enginehouse.build.compensation import InputMoments
from enginehouse.build.quantization import Int4Weight, fp8_scale
from enginehouse.build.reference import ReferenceModel, fast_products
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.model import PREFIX, DecoderLayer, causal_attention
from enginehouse.runtime.packing import pack_int4
from enginehouse.runtime.rope import Angles
from enginehouse.runtime.traits import AttentionRule

# Linears that share an input, and so its factors; in the order in which a layer runs them.
SHARED_INPUTS = (
    ("attention.qkv",),
    ("attention.dense",),
    ("mlp.fc", "mlp.gate"),
    ("mlp.proj",),
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


class _Seen(Exception):
    """The linear that was waited for has been shown its input: the rest can be spared."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    moments: InputMoments
    largest: Tensor  # [in], of each channel


class LayerwiseAwq:
    """Satisfies `units.LayerLinears`. Layers must be asked for in order, each once; those that are
    not asked for run unquantised.

    layer: the one it stands before. An earlier run's activations are gone on with when they stand
    at `first`, the first layer that is still wanted, or before it.
    """

    def __init__(
        self,
        config: ModelConfig,
        reference: ReferenceModel,
        sequences: Sequence[Tensor],
        saved: SavedActivations,
        first: int = 0,
    ) -> None:
        self.config = config
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
            if is_excluded(self.config, layer, modules[0]):
                continue
            inputs = self._inputs(layer, tensors, modules[0], truths.pop(modules[0]))
            weights = [tensors[f"{module}.weight"] for module in modules]
            linear = self._quantized(torch.cat(weights), inputs)
            rows = [len(weight) for weight in weights]
            result |= self._stored(modules, linear, rows, inputs)
            parts = linear.dequantized().split(rows)
            for module, part in zip(modules, parts, strict=True):
                tensors[f"{module}.weight"] = part
        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        for i in range(len(self._hidden)):
            self._hidden[i] = decoder.feed_forward(self._enter_mlp(layer, decoder, i))
        self._attended.clear()
        self._middle.clear()
        return result

    def _quantized(self, weight: Tensor, inputs: _Inputs) -> AwqLinear:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return quantize_awq(weight, inputs.moments, self.config.quantization.group_size, dtype)

    def _run_unquantised(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """What enters each module, sequence by sequence, in bfloat16 (they are differences' small
        part); the truth is one layer further.
        """
        seen: dict[str, list[Tensor]] = {}
        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        decoder.observe = lambda name, x: seen.setdefault(name, []).append(x.bfloat16())
        for i, states in enumerate(self._truth):
            self._truth[i] = decoder(layer, states, self._angles(layer, states), causal_attention)
        return seen

    def _inputs(
        self, layer: int, tensors: dict[str, Tensor], module: str, truths: list[Tensor]
    ) -> _Inputs:
        """What enters `module` when the layer runs with `tensors`, and what should."""
        seen: list[Tensor] = []

        def observe(name: str, x: Tensor) -> None:
            if name == module:
                seen.append(x)
                raise _Seen

        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        moments: InputMoments | None = None
        for i, truth in enumerate(truths):
            in_mlp = module.startswith("mlp.")
            middle = self._enter_mlp(layer, decoder, i) if in_mlp else None
            decoder.observe = observe
            try:
                if middle is None:
                    self._attend(layer, decoder, i)
                else:
                    decoder.feed_forward(middle)
            except _Seen:
                pass
            decoder.observe = None
            x = seen.pop()
            if moments is None:
                moments, largest = InputMoments(x.shape[1], x.device), x.abs().amax(0)
            moments.add(x, truth)
            torch.maximum(largest, x.abs().amax(0), out=largest)
        assert moments is not None, "there is no calibration text"
        return _Inputs(moments, largest)

    def _angles(self, layer: int, states: Tensor) -> Angles:
        local = self.reference.traits.local_rope[layer]
        return self._rotary.at(torch.arange(len(states), device=states.device))[local]

    def _attend(self, layer: int, decoder: DecoderLayer, sequence: int) -> Tensor:
        """The layer's first half, with the attention of an earlier time if there is one."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
            if sequence not in self._attended:
                self._attended[sequence] = causal_attention(layer, q, k, v, rule)
            return self._attended[sequence]

        states = self._hidden[sequence]
        return decoder.attend(layer, states, self._angles(layer, states), attend)

    def _enter_mlp(self, layer: int, decoder: DecoderLayer, sequence: int) -> Tensor:
        """What the first half gives, computed once, when its linears are settled."""
        if sequence not in self._middle:
            self._middle[sequence] = self._attend(layer, decoder, sequence)
        return self._middle[sequence]

    def _stored(
        self, modules: Sequence[str], linear: AwqLinear, rows: list[int], inputs: _Inputs
    ) -> dict[str, Tensor]:
        """A row range of the linear for each module. W4A8's two scales are one for them all."""
        q, scale = linear.weight
        extra = {"prequant_scaling_factor": linear.prequant}
        if self.config.quantization.quant_algo == "W4A8_AWQ":
            weight = Int4Weight(q, scale)
            largest = float((weight.q.view(*scale.shape, -1).abs().amax(-1) * scale).amax())
            entering = float((inputs.largest * linear.prequant.float()).amax())
            extra["weights_scaling_factor_2"] = torch.tensor([fp8_scale(largest)])
            extra["activation_scaling_factor"] = torch.tensor([fp8_scale(entering)])
        result: dict[str, Tensor] = {}
        parts = zip(modules, q.split(rows), scale.split(rows), strict=True)
        for module, part, part_scale in parts:
            result[f"{module}.weight"] = pack_int4(part)
            result[f"{module}.weights_scaling_factor"] = part_scale
            for name, tensor in extra.items():
                result[f"{module}.{name}"] = tensor
        return result

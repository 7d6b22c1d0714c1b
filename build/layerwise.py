"""AWQ through the whole model: each layer is quantised on what the layers before it now give.

Asked for one layer at a time, in order. Within a layer too, a linear's inputs are those that the
quantised linears before it produce. Memory: one layer in float32, one second moment of a
linear's inputs, and the calibration set's activations.
Source: AWQ (Lin et al., 2023); sequential calibration as in GPTQ (Frantar et al., 2023), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.activations import SavedActivations
from enginehouse.build.awq import AwqLinear, InputMoments, quantize_awq
from enginehouse.build.quantization import Int4Weight, fp8_scale
from enginehouse.build.reference import ReferenceModel
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.model import PREFIX, DecoderLayer, causal_attention
from enginehouse.runtime.packing import pack_int4
from enginehouse.runtime.rope import Rotary
from enginehouse.runtime.traits import AttentionRule

# Linears that share an input, and so its factors; in the order in which a layer runs them.
SHARED_INPUTS = (
    ("attention.qkv",),
    ("attention.dense",),
    ("mlp.fc", "mlp.gate"),
    ("mlp.proj",),
)


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
        self._rotary = Rotary(reference.config, max(len(ids) for ids in sequences))
        earlier = saved.load()
        if earlier is not None and earlier.layer <= first:
            self.layer, self._hidden = earlier.layer, earlier.hidden
        else:
            self.layer, self._hidden = 0, reference.embed(sequences)
        # What attention gave for each sequence: it stands once a layer's q, k and v are settled.
        self._attended: dict[int, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, layer: int) -> dict[str, Tensor]:
        """The checkpoint's tensors of the layer's quantised linears, whole, by module."""
        assert layer >= self.layer, f"layer {layer} asked for after {self.layer - 1}"
        for unquantized in range(self.layer, layer):
            self._attended.clear()
            self._run(unquantized, self.reference.tensors(PREFIX.format(unquantized)))
        self.layer = layer
        self.saved.save(layer, self._hidden)
        tensors = self.reference.tensors(PREFIX.format(layer))
        self._attended.clear()
        result: dict[str, Tensor] = {}
        for shared in SHARED_INPUTS:
            modules = [name for name in shared if f"{name}.weight" in tensors]
            if self._excluded(layer, modules[0]):
                continue
            inputs = self._inputs(layer, tensors, modules[0])
            weights = [tensors[f"{module}.weight"] for module in modules]
            linear = self._quantized(torch.cat(weights), inputs)
            rows = [len(weight) for weight in weights]
            result |= self._stored(modules, linear, rows, inputs)
            parts = linear.dequantized().split(rows)
            for module, part in zip(modules, parts, strict=True):
                tensors[f"{module}.weight"] = part
        self._run(layer, tensors)
        self.layer = layer + 1
        return result

    def _quantized(self, weight: Tensor, inputs: _Inputs) -> AwqLinear:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return quantize_awq(weight, inputs.moments, self.config.quantization.group_size, dtype)

    def _excluded(self, layer: int, module: str) -> bool:
        """Patterns know a layer by its number in its pipeline stage."""
        config = self.config
        for pp_rank in range(config.mapping.pp_size):
            layers = config.mapping.layers(pp_rank, config.num_hidden_layers)
            if layer in layers:
                name = PREFIX.format(layer - layers.start) + module
                return config.quantization.excludes(name)
        raise AssertionError(layer)

    def _inputs(self, layer: int, tensors: dict[str, Tensor], module: str) -> _Inputs:
        """What enters `module` when the layer runs with `tensors`."""
        seen: list[_Inputs] = []

        def observe(name: str, x: Tensor) -> None:
            if name != module:
                return
            if not seen:
                seen.append(_Inputs(InputMoments(x.shape[1]), x.abs().amax(0)))
            seen[0].moments.add(x)
            torch.maximum(seen[0].largest, x.abs().amax(0), out=seen[0].largest)
            raise _Seen

        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        decoder.observe = observe
        for i in range(len(self._hidden)):
            try:
                self._forward(layer, decoder, i)
            except _Seen:
                continue
        return seen[0]

    def _forward(self, layer: int, decoder: DecoderLayer, sequence: int) -> Tensor:
        """One sequence through the layer, with the attention of an earlier time if there is one."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
            if sequence not in self._attended:
                self._attended[sequence] = causal_attention(layer, q, k, v, rule)
            return self._attended[sequence]

        states = self._hidden[sequence]
        local = self.reference.traits.local_rope[layer]
        angles = self._rotary.at(torch.arange(len(states)))[local]
        return decoder(layer, states, angles, attend)

    def _run(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Carry the activations through the quantised layer."""
        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        for i in range(len(self._hidden)):
            self._hidden[i] = self._forward(layer, decoder, i)

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

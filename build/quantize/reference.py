"""The unquantised model, run with one decoder layer's weights in memory at a time.

Calibration watches its keys and values; verification takes its logits as the truth. Activations
are carried from layer to layer; nothing is cached and nothing is sampled. Runs on a CUDA device
where there is one: a layer's weights are moved there, and logits brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.quantize.activations import LayerProgress
from enginehouse.build.quantize.units import read_row
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.rope import Rotary
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.torch.attention import soft_cap
from enginehouse.runtime.torch.decoder import (
    PREFIX,
    Attention,
    DecoderLayer,
    causal_attention,
    normed,
)
from enginehouse.runtime.torch.entry import Entry, Exit


def default_device() -> torch.device:
    """Where calibration and the reference run: the current CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def fast_products() -> Iterator[None]:
    """float32 products as calibration needs them: oneDNN's, which on AMD take half of MKL's time,
    and which may round their factors to bfloat16 on CPUs, or to TF32 on GPUs, that gain by it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class ReferenceModel:
    """Runs token sequences through the source's weights in float32 arithmetic."""

    def __init__(
        self, config: ModelConfig, source: SourceCheckpoint, device: torch.device | None = None
    ) -> None:
        self.device = device or default_device()
        self.config = replace(config, mapping=Mapping(), quantization=QuantConfig())
        self.traits = traits_of(self.config)
        self.source = source
        self._rows = {row.target: row for row in stage_rows(self.config, 0)}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """float32, on the device, fused as the engine has them, keyed by what follows `prefix`."""
        return {name: tensor.float() for name, tensor in self._stored(prefix).items()}

    def _stored(self, prefix: str) -> dict[str, Tensor]:
        """The same in the source's dtype."""
        return {
            name[len(prefix) :]: read_row(row, self.source, self.config).to(self.device)
            for name, row in self._rows.items()
            if name.startswith(prefix)
        }

    def embedded(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """What enters the first layer: int64 [tokens] -> float32 rows, as `Entry` gives them."""
        entry = Entry(self.config, self._stored, torch.float32)
        return [entry(ids.to(self.device)) for ids in sequences]

    def rotary(self, max_positions: int) -> Rotary:
        """The angles of positions up to that, on the device."""
        return Rotary(self.config, max_positions).to(self.device)

    @torch.inference_mode()
    def hidden_states(
        self,
        sequences: Sequence[Tensor],
        advance: Callable[[int], None] = lambda layers: None,
        attention: Attention = causal_attention,
        earlier: LayerProgress | None = None,
        passed: Callable[[int, list[Tensor]], None] = lambda layer, hidden: None,
    ) -> list[Tensor]:
        """Each sequence of ids: int64 [tokens] -> [tokens, hidden_size] before the last norm.

        On the device, as is what attention is given. advance(1) after each layer, and
        passed(its successor, what enters that). earlier: start from there.
        Memory: one layer in float32, and the sequences' activations.
        """
        if earlier is None:
            first, hidden = 0, self.embedded(sequences)
        else:
            first, hidden = earlier.layer, [states.to(self.device) for states in earlier.hidden]
        advance(first)
        rotary = self.rotary(max(len(ids) for ids in sequences))
        for index in range(first, self.config.num_hidden_layers):
            layer = DecoderLayer(self.config, self.tensors(PREFIX.format(index)), torch.float32)
            for i, states in enumerate(hidden):
                positions = torch.arange(len(states), device=self.device)
                rope = self.traits.ropes[index]
                angles = rotary.of(rope, positions)
                hidden[i] = layer(index, states, angles, attention)
            advance(1)
            passed(index + 1, hidden)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """float32 [tokens, vocab_size], on the CPU, for each of what `hidden_states` or a walk over
        all layers gave.
        """
        norm, last = self.tensors("transformer.ln_f."), self.tensors("lm_head.")
        weight, bias = norm.get("weight"), norm.get("bias")
        leave = Exit(self.config, self.tensors, torch.float32)
        scale, cap = self.traits.logits_scale, self.traits.logits_soft_cap

        def given(states: Tensor) -> Tensor:
            states = normed(leave(states), weight, bias, self.config)
            return functional.linear(states, last["weight"], last.get("bias"))

        return [soft_cap(given(states) * scale, cap).cpu() for states in hidden]

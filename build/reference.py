"""The unquantised model, run with one decoder layer's weights in memory at a time.

Calibration watches its linear inputs; verification takes its logits as the truth. Activations
are carried from layer to layer; nothing is cached and nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.build.activations import LayerProgress
from enginehouse.build.architectures import stage_rows
from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.units import read_row
from enginehouse.runtime.attention import soft_cap
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.model import PREFIX, Attention, DecoderLayer, causal_attention
from enginehouse.runtime.rope import Rotary
from enginehouse.runtime.traits import traits_of

LayerObserver = Callable[[int, str, Tensor], None]  # layer, module, input [tokens, in_features]


class ReferenceModel:
    """Runs token sequences through the source's weights in float32 arithmetic."""

    def __init__(self, config: ModelConfig, source: SourceCheckpoint) -> None:
        self.config = replace(config, mapping=Mapping(), quantization=QuantConfig())
        self.traits = traits_of(self.config)
        self.source = source
        self._rows = {row.target: row for row in stage_rows(self.config, 0)}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """float32, fused as the engine has them, keyed by what follows `prefix`."""
        return {
            name[len(prefix) :]: read_row(row, self.source, self.config).float()
            for name, row in self._rows.items()
            if name.startswith(prefix)
        }

    def embed(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """What enters the first layer: [tokens, hidden_size] for each int64 [tokens]."""
        embedding = self.tensors("transformer.vocab_embedding.")["weight"]
        return [embedding[ids] * self.traits.embedding_scale for ids in sequences]

    @torch.inference_mode()
    def hidden_states(
        self,
        sequences: Sequence[Tensor],
        observe: LayerObserver | None = None,
        advance: Callable[[int], None] = lambda layers: None,
        attention: Attention = causal_attention,
        earlier: LayerProgress | None = None,
        passed: Callable[[int, list[Tensor]], None] = lambda layer, hidden: None,
    ) -> list[Tensor]:
        """Each sequence of ids: int64 [tokens] -> [tokens, hidden_size] before the last norm.

        advance(1) after each layer, and passed(its successor, what enters that). earlier: start
        from there. Memory: one layer in float32, and the sequences' activations.
        """
        first, hidden = (earlier.layer, earlier.hidden) if earlier else (0, self.embed(sequences))
        advance(first)
        rotary = Rotary(self.config, max(len(ids) for ids in sequences))
        for index in range(first, self.config.num_hidden_layers):
            layer = DecoderLayer(self.config, self.tensors(PREFIX.format(index)), torch.float32)
            if observe is not None:
                layer.observe = partial(observe, index)
            for i, states in enumerate(hidden):
                angles = rotary.at(torch.arange(len(states)))[self.traits.local_rope[index]]
                hidden[i] = layer(index, states, angles, attention)
            advance(1)
            passed(index + 1, hidden)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """float32 [tokens, vocab_size] for each of what `hidden_states` gave."""
        norm = self.tensors("transformer.ln_f.")["weight"]
        head = self.tensors("lm_head.")["weight"]
        epsilon, cap = self.config.norm_epsilon, self.traits.logits_soft_cap
        return [
            soft_cap(functional.rms_norm(states, norm.shape, norm, epsilon) @ head.T, cap)
            for states in hidden
        ]

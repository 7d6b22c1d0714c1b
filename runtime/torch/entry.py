"""What enters a decoder's first layer: embeddings, and of some models what each layer gets of a
token besides; how a layer takes up that; and what of it all goes to the head.

Source: transformers' Gemma 3n and Gemma 4 (per-layer embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.carried import carried
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.checkpoint.weights import module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.linear import Linear, make_linear
from enginehouse.runtime.torch.mlp import Run, activated
from enginehouse.runtime.torch.streams import merged, opened

_FIRST = "transformer.vocab_embedding."
_TABLES = ("transformer.per_layer_embedding.", "transformer.per_layer_projection.")
_STREAMS, _MERGES = "transformer.stream_projections.", "transformer.stream_merges."
_NORM = "transformer.per_layer_layernorm."
_LINEARS = ("per_layer_gate", "per_layer_proj")


class Entry:
    """stored(prefix): the merged tensors below a prefix, without it. The table of layers' inputs,
    which is the largest of all, stays in the dtype that it is stored in.
    """

    def __init__(
        self,
        config: ModelConfig,
        stored: Callable[[str], Mapping[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.carried = carried(config)
        self.scale = traits_of(config).embedding_scale
        self.embedding = stored(_FIRST)["weight"].to(dtype)
        several = config.num_streams > 1
        self.streams = stored(_STREAMS)["weight"].to(dtype) if several else None
        if config.per_layer_size:
            self.table = stored(_TABLES[0])["weight"]
            self.projection = stored(_TABLES[1])["weight"].to(dtype)
            self.norm = stored(_NORM)["weight"].to(dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: int64 [tokens] -> [tokens, width of a row]."""
        hidden = self.embedding[ids] * self.scale
        streams = hidden if self.streams is None else opened(hidden, self.streams)
        if self.carried.is_plain:
            return streams
        parts = [streams]
        if self.config.per_layer_size:
            parts.append(self._inputs(ids, hidden))
        kept = self.carried.width - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, hidden.new_zeros(len(ids), kept)], dim=1)

    def _inputs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """[tokens, layers * size]: of the token's own and of a projection of its embedding the sum,
        over the root of two.
        """
        c = self.config
        projected = functional.linear(hidden, self.projection) * c.hidden_size**-0.5
        heads = projected.unflatten(1, (c.num_hidden_layers, c.per_layer_size))
        normed = functional.rms_norm(heads, heads.shape[-1:], self.norm, c.norm_epsilon)
        known = torch.where(ids < len(self.table), ids, 0)
        own = self.table[known].to(self.dtype) * math.sqrt(c.per_layer_size)
        return (normed.flatten(1) + own) * 2**-0.5


class Exit:
    """Rows that the last layer gives -> hidden states before the last norm."""

    def __init__(
        self,
        config: ModelConfig,
        stored: Callable[[str], Mapping[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.carried = carried(config)
        several = config.num_streams > 1
        self.streams = stored(_MERGES)["weight"].to(dtype) if several else None

    def __call__(self, rows: Tensor) -> Tensor:
        streams = rows[:, : self.carried.hidden]
        return streams if self.streams is None else merged(streams, self.streams)


class LayerInputs:
    """tensors: the layer's, whole, without its prefix."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.activation = traits_of(config).activation
        self.linears: dict[str, Linear] = {
            name: make_linear([module_tensors(tensors, name)], dtype) for name in _LINEARS
        }

    def __call__(self, hidden: Tensor, own: Tensor, run: Run) -> Tensor:
        """hidden: [tokens, hidden_size]; own: [tokens, size] -> as hidden, not normed."""
        gate, proj = _LINEARS
        gated = activated(run(gate, self.linears[gate], hidden), self.activation) * own
        return run(proj, self.linears[proj], gated)

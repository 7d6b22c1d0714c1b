"""Residual streams: of some models several hidden states go from layer to layer, of which a layer
reads and corrects all, and runs on the first.

Source: Alternating Updates for Efficient Transformers (Baykal et al., 2023), in the form of
transformers' Gemma 3n.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.config import ModelConfig

_LEAST = 1e-5  # of a mean square


class LayerStreams:
    """tensors: the layer's, whole, without its prefix."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.config, self.count = config, config.num_streams
        words = ("router", "predictions", "corrections", "layernorm")
        self.weights = {word: tensors[f"stream_{word}.weight"].to(dtype) for word in words}
        self.scale = tensors["stream.correct_output_scale"].to(dtype)

    def predicted(self, streams: Tensor) -> Tensor:
        """[tokens, streams, hidden_size] -> the same shape: each with a mixture of all."""
        mixed = functional.linear(self._modes(streams[:, 0]), self.weights["predictions"])
        found: Tensor = streams + mixed.unflatten(1, (self.count, self.count)) @ streams
        return found

    def corrected(self, predicted: Tensor, given: Tensor) -> Tensor:
        """predicted, each with a share of the first's error. given: [tokens, hidden_size], what the
        layer makes of the first.
        """
        shares = functional.linear(self._modes(given), self.weights["corrections"]) + 1
        return predicted + shares.unsqueeze(2) * (given - predicted[:, 0]).unsqueeze(1)

    def _modes(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, streams], within one."""
        c = self.config
        normed = functional.rms_norm(x, x.shape[-1:], self.weights["layernorm"], c.norm_epsilon)
        return torch.tanh(functional.linear(normed / c.hidden_size, self.weights["router"]))


def opened(hidden: Tensor, projections: Tensor) -> Tensor:
    """[tokens, hidden_size] -> [tokens, streams * hidden_size]: it, and projections of it that are
    as large; projections: [(streams - 1) * hidden_size, hidden_size].
    """
    others = functional.linear(hidden, projections).unflatten(1, (-1, hidden.shape[1]))
    return torch.cat([hidden, _as_large(others, hidden).flatten(1)], dim=1)


def merged(streams: Tensor, projections: Tensor) -> Tensor:
    """The inverse: [tokens, streams * hidden_size] -> [tokens, hidden_size], the mean of the first
    and of projections of the others, as large as it.
    """
    size = projections.shape[1]
    first, others = streams[:, :size], streams[:, size:].unflatten(1, (-1, size))
    back = torch.einsum("tsh,sgh->tsg", others, projections.unflatten(0, (-1, size)))
    return torch.cat([first.unsqueeze(1), _as_large(back, first)], dim=1).mean(dim=1)


def _as_large(others: Tensor, hidden: Tensor) -> Tensor:
    """others: [tokens, streams, hidden_size], each with the root mean square of hidden."""
    wanted = hidden.square().mean(-1, keepdim=True).sqrt().unsqueeze(1)
    found = others.square().mean(-1, keepdim=True).clamp(min=_LEAST).sqrt()
    return others * wanted / found

"""A layer's MLP: two linears, or three where it is gated, and what its activation does.

Source: GLU Variants Improve Transformer (Shazeer, 2020); the clamped form is GPT-OSS's (OpenAI,
2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.traits import Traits, traits_of
from enginehouse.runtime.checkpoint.weights import module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.linear import Linear, make_linear

# Computes a linear by its name and lets calibration see its input.
Run = Callable[[str, Linear, Tensor], Tensor]


def activated(x: Tensor, activation: str) -> Tensor:
    """activation: silu, gelu (its tanh form), gelu_erf or relu2."""
    if activation in ("gelu", "gelu_erf"):
        return functional.gelu(x, approximate="tanh" if activation == "gelu" else "none")
    return functional.silu(x) if activation == "silu" else x.relu().square()


def gated(gate: Tensor, up: Tensor, traits: Traits) -> Tensor:
    """act(gate) * up, or the clamped form, in which up is one more."""
    if traits.swiglu_limit is None:
        return activated(gate, traits.activation) * up
    gate = gate.clamp(max=traits.swiglu_limit)
    up = up.clamp(-traits.swiglu_limit, traits.swiglu_limit)
    return gate * torch.sigmoid(gate * traits.swiglu_alpha) * (up + 1)


class PlainMlp:
    """tensors: of one MLP, whole, without its prefix. name: of it, before its linears' names."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        name: str = "mlp",
    ) -> None:
        self.config = config
        self.traits = traits_of(config)
        self.name = name
        is_one = config.gate_in_fc or not config.gated_mlp
        words = ("fc",) if is_one else ("fc", "gate")
        self.fc_gate = make_linear([module_tensors(tensors, word) for word in words], dtype)
        self.proj = make_linear([module_tensors(tensors, "proj")], dtype)

    def __call__(self, x: Tensor, run: Run, cutoff: float | None = None) -> Tensor:
        """x: [tokens, hidden_size] -> the same shape. cutoff: gates keep what lies so many of their
        standard deviations above their mean, and no more of it.
        """
        given = run(f"{self.name}.fc", self.fc_gate, x)
        if not self.config.gated_mlp:
            return run(f"{self.name}.proj", self.proj, activated(given, self.traits.activation))
        gate, up = given.chunk(2, dim=-1)
        if self.config.gate_in_fc:
            gate, up = up, gate
        if cutoff is not None:
            spread = gate.std(dim=-1, keepdim=True, unbiased=False)
            gate = (gate - (gate.mean(dim=-1, keepdim=True) + spread * cutoff)).relu()
        return run(f"{self.name}.proj", self.proj, gated(gate, up, self.traits))

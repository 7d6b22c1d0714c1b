"""Rotary position embedding: the angle of each position and frequency, with the usual scalings.

Source: RoFormer (Su et al., 2021), section 3.4, in the half-split (GPT-NeoX) form;
Llama 3.1's frequency scaling as its config.json describes it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

SUPPORTED_SCALINGS = ("default", "none", "linear", "llama3")


def scaling_type(scaling: dict[str, Any] | None) -> str:
    """The name of a rope scaling, under either of its spellings; "none" when there is none."""
    if not scaling:
        return "none"
    return str(scaling.get("type") or scaling.get("rope_type") or "none")


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """float32 [head_size // 2]: radians per position of each rotated pair.

    Raises EngineError for a scaling that this runtime does not know.
    """
    half = torch.arange(0, config.head_size, 2, dtype=torch.int64).float()
    frequencies = 1.0 / config.rotary_base ** (half / config.head_size)
    scaling = config.rotary_scaling
    kind = scaling_type(scaling)
    if kind in ("default", "none") or scaling is None:
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise EngineError(
        f"rotary_scaling type {kind!r} is not known to the torch backend; "
        f"wanted one of {', '.join(SUPPORTED_SCALINGS)}"
    )


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


class RotaryTable:
    """cos and signed sin of every position, so that `apply` is three operations.

    cos, sin: float32 [max_positions, 1, head_size]; the first half of sin is negated.
    """

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        frequencies = inverse_frequencies(config)
        angles = torch.outer(torch.arange(max_positions).float(), frequencies)  # [P, D/2]
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1).unsqueeze(1)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).unsqueeze(1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin rows for these positions: each [tokens, 1, head_size]."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions; x: [tokens, heads, head_size], any floating dtype."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped.float(), sin).to(x.dtype)

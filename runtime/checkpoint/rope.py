"""Rotary position embedding: the angle of each position and frequency, with the usual scalings.

Source: RoFormer (Su et al., 2021), section 3.4, in the half-split (GPT-NeoX) form; YaRN (Peng et
al., 2023); LongRoPE (Ding et al., 2024); Llama 3.1's frequency scaling as its config.json
describes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError


class Frequencies(NamedTuple):
    """inverse: float32 [rotary_dim // 2], radians per position of each rotated pair.

    magnitude: what cos and sin are multiplied by.
    """

    inverse: Tensor
    magnitude: float = 1.0


def scaling_type(scaling: dict[str, Any] | None) -> str:
    """The name of a rope scaling, under either of its spellings; "none" when there is none."""
    if not scaling:
        return "none"
    kind = str(scaling.get("type") or scaling.get("rope_type") or "none")
    return {"default": "none", "su": "longrope"}.get(kind, kind)


def rotary_frequencies(config: ModelConfig, max_positions: int) -> Frequencies:
    """The model's frequencies in a context of `max_positions` tokens.

    Only longrope depends on max_positions: its long factors serve when that exceeds the
    pretrained length, its short ones otherwise.

    Raises EngineError for a scaling that this runtime does not know.
    """
    scaling = config.rotary_scaling
    kind = scaling_type(scaling)
    plain = _plain(config, config.rotary_base)
    if kind == "none" or scaling is None:
        return Frequencies(plain)
    if kind not in _SCALINGS:
        raise EngineError(
            f"rotary_scaling type {kind!r} is not known to the torch backend; "
            f"wanted none or one of {', '.join(_SCALINGS)}"
        )
    return _SCALINGS[kind](config, scaling, plain, max_positions)


class AllFrequencies(NamedTuple):
    """A model's in a context of some length: those of most layers, those of config.json's local
    base (Gemma 3), and longrope's for contexts up to `pretrained`, where a longer one has others.
    """

    everywhere: Frequencies
    local: Frequencies | None = None
    short: Frequencies | None = None
    pretrained: int | None = None


def all_frequencies(config: ModelConfig, max_positions: int) -> AllFrequencies:
    """Raises EngineError as `rotary_frequencies` does."""
    everywhere = rotary_frequencies(config, max_positions)
    base, scaling = config.extra.get("rope_local_base_freq"), config.rotary_scaling
    local = Frequencies(_plain(config, float(base))) if base else None
    if scaling is not None and scaling_type(scaling) == "longrope":
        pretrained = int(_original(config, scaling))
        if max_positions > pretrained:
            short = rotary_frequencies(config, pretrained)
            return AllFrequencies(everywhere, local, short, pretrained)
    return AllFrequencies(everywhere, local)


def _plain(config: ModelConfig, base: float) -> Tensor:
    half = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float()
    return 1.0 / base ** (half / config.rotary_dim)


def _linear(config: ModelConfig, scaling: dict[str, Any], plain: Tensor, _: int) -> Frequencies:
    return Frequencies(plain / float(scaling["factor"]))


def _dynamic(config: ModelConfig, scaling: dict[str, Any], plain: Tensor, _: int) -> Frequencies:
    """The base grows beyond max_position_embeddings, which no engine's context exceeds; by an alpha
    (Hunyuan's) it grows at once.
    """
    if not (alpha := scaling.get("alpha")):
        return Frequencies(plain)
    dim = config.rotary_dim
    return Frequencies(_plain(config, config.rotary_base * float(alpha) ** (dim / (dim - 2))))


def _llama3(config: ModelConfig, scaling: dict[str, Any], plain: Tensor, _: int) -> Frequencies:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / plain
    blend = ((_original(config, scaling) / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return Frequencies((1 - blend) * plain / factor + blend * plain)


def _yarn(config: ModelConfig, scaling: dict[str, Any], plain: Tensor, _: int) -> Frequencies:
    """Slow pairs are stretched by `factor`, fast ones kept, with a ramp between (YaRN, 3.2)."""
    original = _original(config, scaling)
    factor = float(scaling.get("factor") or config.max_position_embeddings / original)
    dim = config.rotary_dim

    def pair_of(rotations: float) -> float:
        """The pair that turns so often within the pretrained length."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(config.rotary_base))

    low = pair_of(float(scaling.get("beta_fast") or 32))
    high = pair_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / span).clamp(0.0, 1.0)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        whole, some = scaling.get("mscale_all_dim"), scaling.get("mscale")
        magnitude = (
            _yarn_magnitude(factor, some) / _yarn_magnitude(factor, whole)
            if whole and some
            else _yarn_magnitude(factor, 1.0)
        )
    return Frequencies(plain / factor * ramp + plain * (1 - ramp), float(magnitude))


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _proportional(
    config: ModelConfig, scaling: dict[str, Any], plain: Tensor, _: int
) -> Frequencies:
    """Of the layers that this table turns: a share of a head's pairs turn, the others stand."""
    layer = traits_of(config).ropes.index(0)
    size = config.of_layer(layer).head_size
    turned = int(float(scaling["partial_rotary_factor"]) * size // 2)
    pairs = torch.arange(0, 2 * turned, 2, dtype=torch.int64).float()
    inverse = 1.0 / config.rotary_base ** (pairs / size) / float(scaling["factor"])
    return Frequencies(torch.cat([inverse, torch.zeros(size // 2 - turned)]))


def _longrope(
    config: ModelConfig, scaling: dict[str, Any], plain: Tensor, max_positions: int
) -> Frequencies:
    """Each pair has its own stretch, one list for long contexts and one for short, and the
    magnitude may differ with them (PhiMoE).
    """
    original = _original(config, scaling)
    factor = float(scaling.get("factor") or config.max_position_embeddings / original)
    length = "long" if max_positions > original else "short"
    stretch = torch.tensor(scaling[f"{length}_factor"])
    magnitude = scaling.get(f"{length}_mscale", scaling.get("attention_factor"))
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Frequencies(plain / stretch.float(), float(magnitude))


def _original(config: ModelConfig, scaling: dict[str, Any]) -> float:
    known = scaling.get("original_max_position_embeddings")
    return float(known or config.max_position_embeddings)


_SCALINGS: dict[str, Callable[[ModelConfig, dict[str, Any], Tensor, int], Frequencies]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


class Angles(NamedTuple):
    """cos and signed sin of some positions: float32 [tokens, 1, rotary_dim], None where nothing is
    turned. query_scale: what queries are multiplied by then, float32 [tokens, 1, 1]; None for 1.
    """

    cos: Tensor | None
    sin: Tensor | None
    query_scale: Tensor | None = None


class RotaryTable:
    """cos and signed sin of every position, so that `rotate` is three operations.

    cos, sin: float32 [max_positions, 1, rotary_dim]; the first half of sin is negated.
    """

    def __init__(self, frequencies: Frequencies, max_positions: int) -> None:
        positions = torch.arange(max_positions).float()
        angles = torch.outer(positions, frequencies.inverse)  # [P, rotary_dim / 2]
        cos, sin = (part * frequencies.magnitude for part in (angles.cos(), angles.sin()))
        self.cos = torch.cat([cos, cos], dim=-1).unsqueeze(1)
        self.sin = torch.cat([-sin, sin], dim=-1).unsqueeze(1)

    def at(self, positions: Tensor) -> Angles:
        return Angles(self.cos[positions], self.sin[positions])


class Rotary:
    """A model's tables: one, and where config.json has a local base (Gemma 3), a second.

    longrope's short factors have a table of their own. Which of the two turns a token is settled
    by its context, the length of its sequence. `pretrained` is the longest that the short factors
    serve, None where nothing changes: keys of a shorter sequence are of no use to a longer one.
    """

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        found = all_frequencies(config, max_positions)
        self.tables = [
            RotaryTable(found.everywhere, max_positions),
            *([RotaryTable(found.local, max_positions)] if found.local is not None else []),
        ]
        self.pretrained = found.pretrained
        traits = traits_of(config)
        self.growth, self.grows_unturned = traits.query_growth, traits.grows_unturned
        self.short: RotaryTable | None = None
        if found.short is not None and found.pretrained is not None:
            self.short = RotaryTable(found.short, found.pretrained)

    def at(self, positions: Tensor, contexts: Tensor | None = None) -> list[Angles]:
        """The angles of these positions in each table: the global one first.

        contexts: int64 [tokens], each above its position; without it all positions are of one
        whole sequence.
        """
        angles = [table.at(positions) for table in self.tables]
        if self.pretrained is not None and self.short is not None and len(positions):
            if contexts is None:
                contexts = (positions.max() + 1).expand(len(positions))
            short = (contexts <= self.pretrained).view(-1, 1, 1)
            turned = self.short.at(positions.clamp(max=self.pretrained - 1))
            assert turned.cos is not None and turned.sin is not None
            assert angles[0].cos is not None and angles[0].sin is not None
            angles[0] = Angles(
                torch.where(short, turned.cos, angles[0].cos),
                torch.where(short, turned.sin, angles[0].sin),
            )
        if self.growth is not None and not self.grows_unturned:
            scale = growth(positions, *self.growth).view(-1, 1, 1)
            angles = [each._replace(query_scale=scale) for each in angles]
        return angles

    def of(self, rope: int | None, positions: Tensor) -> Angles:
        """Those of a layer of `Traits.ropes`, in one whole sequence."""
        return self.unturned(positions) if rope is None else self.at(positions)[rope]

    def unturned(self, positions: Tensor) -> Angles:
        """Those of a layer without rope."""
        if self.growth is None or not self.grows_unturned:
            return Angles(None, None)
        return Angles(None, None, growth(positions, *self.growth).view(-1, 1, 1))

    def to(self, device: torch.device | None) -> Rotary:
        """The tables moved to a device, where positions must then lie; itself."""
        for table in [*self.tables, *([self.short] if self.short is not None else [])]:
            table.cos, table.sin = table.cos.to(device), table.sin.to(device)
        return self


def growth(positions: Tensor, beta: float, length: int, first: int) -> Tensor:
    """What queries at these positions are multiplied by: float32, of positions' shape.

    Source: transformers' Ministral 3, after Llama 4's scaling of its attention's temperature.
    """
    counted = torch.div(positions + first, length, rounding_mode="floor")
    return 1 + beta * torch.log1p(counted.float())


def rotate(x: Tensor, angles: Angles, interleaved: bool = False) -> Tensor:
    """Rotate heads by their positions; x: [tokens, heads, head_size], any floating dtype.

    Elements beyond rotary_dim are left as they are. A pair is of one element of each half, or of
    two neighbours where they are interleaved (GPT-J's form).
    """
    cos, sin = angles.cos, angles.sin
    if cos is None or sin is None:
        return x
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :dim], angles, interleaved), x[..., dim:]], dim=-1)
    if interleaved:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned: Tensor = rotate(halves, angles).unflatten(-1, (2, -1)).transpose(-1, -2)
        return turned.flatten(-2)
    swapped = x.roll(dim // 2, dims=-1)
    return torch.addcmul(x * cos, swapped.float(), sin).to(x.dtype)

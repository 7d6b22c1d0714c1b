"""Sizes of what layers have in the place of keys and values of each head: latents, or a state.

Read out of config.json's words, and counted for the whole model, never per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from enginehouse.runtime.errors import EngineError


class Latent(NamedTuple):
    """Sizes of latent attention: ranks of what queries (0: they are not compressed) and keys and
    values are compressed to; of each head the elements of a key that rope does not turn and that it
    turns, and of a value.
    """

    query_rank: int
    rank: int
    nope: int
    rope: int
    value: int


class Delta(NamedTuple):
    """Sizes of linear attention by the gated delta rule, and the layers that have it.

    Each key head serves `group` value heads; a state [key_size, value_size] is kept for each value
    head, and the last kernel - 1 inputs of a convolution over the tokens.
    Source: Gated Delta Networks (Yang et al., 2024).
    """

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def group(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def values(self) -> int:
        """Elements of the values of a key head."""
        return self.group * self.value_size

    @property
    def mixed(self) -> int:
        """Of a key head what the convolution sees: q, k and its values."""
        return 2 * self.key_size + self.values

    @property
    def rows(self) -> int:
        """Of a key head in in_qkvz: that, and the gates of its values."""
        return self.mixed + self.values

    def state_bytes(self, width: int) -> int:
        """What a sequence keeps in each layer, of all heads: states in float32, and inputs of the
        convolution in numbers of `width` bytes.
        """
        states = self.value_heads * self.key_size * self.value_size
        return 4 * states + width * (self.kernel - 1) * self.key_heads * self.mixed


# Latent's fields in config.json.
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def latent_of(extra: Mapping[str, Any]) -> Latent | None:
    if not extra.get("kv_lora_rank"):
        return None
    return Latent(*(int(extra.get(name) or 0) for name in LATENT))


_NUMBERS = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel")
_MANY = 1 << 20


def delta_of(extra: Mapping[str, Any]) -> Delta | None:
    """Raises EngineError for what is no such object."""
    found = extra.get("linear_attention")
    if not found:
        return None
    try:
        delta = Delta(frozenset(found["layers"]), *(found[name] for name in _NUMBERS))
        right = all(type(n) is int and 0 <= n < _MANY for n in (*delta.layers, *delta[1:]))
        right = right and min(delta[1:]) > 0 and not delta.value_heads % delta.key_heads
    except (AttributeError, KeyError, TypeError):
        right = False
    if not right:
        raise EngineError(
            f"config.json has linear_attention={found!r}; wanted its layers and "
            + ", ".join(_NUMBERS)
        )
    return delta

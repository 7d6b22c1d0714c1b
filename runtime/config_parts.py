"""Values of config.json, each refused by name when it is wrong; and sizes of what layers have in
the place of keys and values of each head: latents, or a state. Counted for the whole model.
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


def check_delta(extra: Mapping[str, Any]) -> None:
    """EngineError for what is no such object."""
    found = extra.get("linear_attention")
    try:
        delta = delta_of(extra)
        if delta is None:
            return
        right = all(type(n) is int and 0 <= n < _MANY for n in (*delta.layers, *delta[1:]))
        right = right and min(delta[1:]) > 0 and not delta.value_heads % delta.key_heads
    except (AttributeError, KeyError, TypeError):
        right = False
    if not right:
        raise EngineError(
            f"config.json has linear_attention={found!r}; wanted its layers and "
            + ", ".join(_NUMBERS)
        )


def delta_of(extra: Mapping[str, Any]) -> Delta | None:
    """Of words that were checked."""
    found = extra.get("linear_attention")
    if not found:
        return None
    return Delta(frozenset(found["layers"]), *(found[name] for name in _NUMBERS))


def json_object(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise EngineError(f"config.json has {key}={value!r}; wanted a JSON object")
    return value


def whole(
    data: dict[str, Any], key: str, default: int | None = None, least: int = 1, most: int = 2**31
) -> int:
    """A whole number; null is the default, and KeyError where there is none."""
    value = data.get(key)
    if value is None:
        value = data[key] if default is None else default
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole or not least <= value <= most:
        raise EngineError(f"config.json has {key}={value!r}; wanted {least} to {most}")
    return int(value)


def number(data: dict[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise EngineError(f"config.json has {key}={value!r}; wanted a number, not below 0")
    return float(value)


def word(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise EngineError(f"config.json has {key}={value!r}; wanted a word, or null")
    return value

"""Which of a decoder's activations float16 cannot hold, where an engine computes in it.

A pass in float32 or bfloat16 is watched: up to the first number beyond the range a GPU has the same
numbers, and there it has infinity. What a kernel keeps in float32 is not looked at: the inside of
norms and softmax, the sums of products. Attention over a prompt is an exception: TensorRT-LLM adds
unscaled scores up in float16. A rank's part of a sum is not seen, only the whole.
Source: TensorRT-LLM 1.2.1, `AttentionOp` (`mFMHAForceFP32Acc`), `fused_multihead_attention_v2`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.torch.decoder import Decoder, DecoderLayer
from enginehouse.runtime.torch.linear import JoinedLinear, Linear, PrequantLinear
from enginehouse.runtime.torch.mlp import PlainMlp
from enginehouse.runtime.torch.self_attention import KEYS, QUERIES

FLOAT16_MAX = torch.finfo(torch.float16).max
_NEAR = FLOAT16_MAX / 4  # other texts than one of some hundred tokens reach further


class Magnitude(NamedTuple):
    """The largest of one place's numbers, and the place: "layer 3's mlp.proj's input"."""

    value: float
    place: str

    @property
    def doubt(self) -> str | None:
        """What to say of numbers that come near the end of the range."""
        if self.value <= _NEAR:
            return None
        return (
            f"{self.place} reaches {self.value:.0f} and float16 ends at {FLOAT16_MAX:.0f}, which "
            "another text may pass: --dtype bfloat16 has no such end"
        )


class Float16Watch:
    """Looks at a decoder's activations from `with` to its end, which changes none of them.

    scales_queries: the engine scales queries before their product with the keys, not after it.
    largest: of all that was seen; first_beyond: the first that is too large, in the order of
    computing. Numbers that are not finite in the wider dtype either are left to other checks.
    """

    def __init__(self, model: Decoder, scales_queries: bool) -> None:
        self.model = model
        self.scales_queries = scales_queries
        self.largest = Magnitude(0.0, "nothing")
        self.first_beyond: Magnitude | None = None
        self._queries: Tensor | None = None

    def __enter__(self) -> Float16Watch:
        self.model.watch = self._see
        for index, layer in enumerate(self.model.layers):
            layer.watch = partial(self._see_in_layer, index)
            layer.observe = partial(self._see_input, f"layer {index}'s ", _linears(layer))
        return self

    def __exit__(self, *_: object) -> None:
        self.model.watch = None
        for layer in self.model.layers:
            layer.watch = layer.observe = None

    @property
    def overflow(self) -> str | None:
        """Why float16 cannot be computed in, in one sentence, if so."""
        if self.first_beyond is None:
            return None
        value, place = self.first_beyond
        return (
            f"{place} reaches {value:.0f} on a text of some hundred tokens and float16 ends at "
            f"{FLOAT16_MAX:.0f}: a GPU would go on with infinity and NaN; build with --dtype "
            "bfloat16"
        )

    def _see_in_layer(self, index: int, place: str, x: Tensor) -> None:
        self._see(f"layer {index}'s {place}", x)
        if place == QUERIES:
            self._queries = x
        if place == KEYS and self._queries is not None:
            rule = self.model.traits.rules[index]
            scale = rule.scale if self.scales_queries and rule.soft_cap is None else 1.0
            self._see_scores(f"layer {index}'s attention score", self._queries * scale, x)

    def _see_scores(self, place: str, queries: Tensor, keys: Tensor) -> None:
        """Both [tokens, heads, head_size]; a token looks at those up to itself, head by head."""
        shared = queries.shape[1] // keys.shape[1]
        for head in range(queries.shape[1]):
            self._see(place, (queries[:, head] @ keys[:, head // shared].T).tril())

    def _see_input(self, layer: str, linears: dict[str, Linear], name: str, x: Tensor) -> None:
        place = f"{layer}{name}'s input"
        self._see(place, x)
        for factor in _factors(linears.get(name)):
            self._see(place, x * factor)

    def _see(self, place: str, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        value = max(-float(low), float(high))
        if not math.isfinite(value):
            return
        if value > self.largest.value:
            self.largest = Magnitude(value, place)
        if value > FLOAT16_MAX and self.first_beyond is None:
            self.first_beyond = Magnitude(value, place)


def _linears(layer: DecoderLayer) -> dict[str, Linear]:
    """Those that AWQ may have given factors: experts have none."""
    found = dict(layer.attention.linears) if layer.attention is not None else {}
    mlp = layer.mlp
    if isinstance(mlp, PlainMlp):
        found |= {"mlp.fc": mlp.fc_gate, "mlp.proj": mlp.proj}
    return found


def _factors(linear: Linear | None) -> list[Tensor]:
    """What a kernel of its own multiplies a linear's input by, and stores."""
    parts = linear.parts if isinstance(linear, JoinedLinear) else [linear]
    return [part.factor for part in parts if isinstance(part, PrequantLinear) and not part.fp8]

"""Linear attention by the gated delta rule: of the tokens before, a layer keeps a state of one
size.

A state S [key_size, value_size] of each value head fades and learns with each token:

    S <- e^g S;   u = b (v - S^T k);   S <- S + k u^T;   out = S^T q

Source: Gated Delta Networks (Yang et al., 2024), equation 10; over chunks of tokens as in 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.rope import Angles
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.checkpoint.weights import module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta
from enginehouse.runtime.machine.device import zeros
from enginehouse.runtime.torch.around import Around
from enginehouse.runtime.torch.linear import make_linear

_CHUNK = 64  # tokens whose updates are solved for at once
_EPSILON = 1e-6  # of the norms of q and k, in transformers' code


class Past(NamedTuple):
    """What sequences keep of the tokens before: of the convolution its last inputs, [sequences,
    kernel - 1, key_heads, mixed], and states, float32 [sequences, key_heads, group, key_size,
    value_size].
    """

    inputs: Tensor
    states: Tensor

    @classmethod
    def none(cls, delta: Delta, sequences: int, dtype: torch.dtype, device: torch.device) -> Past:
        """Before the first token."""
        inputs = (sequences, delta.kernel - 1, delta.key_heads, delta.mixed)
        states = (sequences, delta.key_heads, delta.group, delta.key_size, delta.value_size)
        return cls(zeros(inputs, dtype, device), zeros(states, torch.float32, device))


class DeltaRule(NamedTuple):
    """The part of a layer that goes from token to token. filter: of the convolution, [key_heads *
    mixed, kernel].
    """

    delta: Delta
    filter: Tensor

    def __call__(
        self, mixed: Tensor, decay: Tensor, rate: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        """What each token reads, float32 [sequences, tokens, key_heads, group, value_size], and the
        past of the token after the last.

        mixed: [sequences, tokens, key_heads, q, k and values]; decay, rate: float32 [sequences,
        tokens, key_heads, group], g and b.
        """
        delta = self.delta
        seen = torch.cat([past.inputs, mixed], dim=1)
        channels = seen.flatten(2).mT
        weight = self.filter.unsqueeze(1)
        given = functional.conv1d(channels, weight, groups=len(weight)).mT
        given = functional.silu(given).float().unflatten(2, (delta.key_heads, delta.mixed))
        q, k, v = given.split([delta.key_size, delta.key_size, delta.values], dim=-1)
        q, k = _unit(q) * delta.key_size**-0.5, _unit(k)
        v = v.unflatten(-1, (delta.group, delta.value_size))
        states, found = past.states, []
        for start in range(0, mixed.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            queries, keys = (x[:, part].transpose(1, 2) for x in (q, k))
            values, fading, learning = (x[:, part].movedim(1, 3) for x in (v, decay, rate))
            out, states = _chunk(queries, keys, values, fading, learning, states)
            found.append(out.movedim(3, 1))
        kept = seen[:, seen.shape[1] - (delta.kernel - 1) :]
        return torch.cat(found, dim=1), Past(kept, states)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPSILON)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule over C tokens: what they read, like v, and the states behind them.

    q, k: [n, key_heads, C, key_size]; v: [n, key_heads, group, C, value_size]; decay, rate: [n,
    key_heads, group, C]. What each token adds, u, is the solution of a triangular system, as all
    it needs of those before it is how much of theirs its key finds.
    """
    q, k = q.unsqueeze(2), k.unsqueeze(2)
    count = v.shape[-2]
    total = decay.cumsum(-1)
    later = torch.ones(count, count, dtype=torch.bool, device=v.device).triu(1)
    fades = total.unsqueeze(-1) - total.unsqueeze(-2)  # from column to row
    fades = fades.masked_fill(later, float("-inf")).exp()
    left = total.exp().unsqueeze(-1)  # of the states that were there
    rate = rate.unsqueeze(-1)
    system = (rate * (k @ k.mT) * fades).tril(-1)
    wanted = rate * (v - left * (k @ states))
    u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = left * (q @ states) + (q @ k.mT * fades) @ u
    kept = fades[..., -1:, :].mT  # of each update, behind the last token
    return out, left[..., -1:, :] * states + (k * kept).mT @ u


class LinearAttention:
    """tensors: the layer's, whole, without its prefix. linears: by their names."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        assert config.delta is not None
        own = module_tensors(tensors, "linear_attention")
        self.delta, self.epsilon = config.delta, config.norm_epsilon
        names = [f"linear_attention.{word}" for word in ("in_qkvz", "in_ba", "dense")]
        self.linears = {n: make_linear([module_tensors(tensors, n)], dtype) for n in names}
        self.rule = DeltaRule(self.delta, own["conv1d.weight"].to(dtype))
        by_heads = (self.delta.key_heads, self.delta.group)
        self.speed = own["A_log"].float().exp().view(by_heads)
        self.bias = own["dt_bias"].float().view(by_heads)
        self.norm = own["layernorm.weight"].float()

    def __call__(self, x: Tensor, rule: AttentionRule, angles: Angles, around: Around) -> Tensor:
        """As HeadAttention's."""
        delta = self.delta
        qkvz = self._run("in_qkvz", x, around).view(len(x), delta.key_heads, delta.rows)
        mixed, gates = qkvz.split([delta.mixed, delta.values], dim=-1)
        rates = self._run("in_ba", x, around).float().view(len(x), delta.key_heads, 2, delta.group)
        rate, step = rates.unbind(2)
        decay = -self.speed * functional.softplus(step + self.bias)
        read = around.recur(self.rule, mixed, decay, rate.sigmoid())
        normed = functional.rms_norm(read, read.shape[-1:], self.norm, self.epsilon)
        given = normed * functional.silu(gates.float()).view(normed.shape)
        return self._run("dense", given.flatten(1).to(x.dtype), around)

    def _run(self, word: str, x: Tensor, around: Around) -> Tensor:
        name = f"linear_attention.{word}"
        return around.run(name, self.linears[name], x)


class StateCache:
    """A slot for each sequence that runs; whose is which is `BlockMemory`'s business. What is in a
    slot that begins is nobody's.

    layers: of each layer with linear attention what all slots hold.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers = () if config.delta is None else sorted(config.delta.layers)
        self.device = device
        self.layers = {
            layer: Past.none(config.delta, num_slots, dtype, device)
            for layer in layers
            if config.delta is not None
        }

    @staticmethod
    def bytes_of(config: ModelConfig, num_slots: int, dtype: torch.dtype) -> int:
        """What so many slots take."""
        if config.delta is None:
            return 0
        return num_slots * len(config.delta.layers) * config.delta.state_bytes(dtype.itemsize)

    def read(self, layer: int, run: StateRun) -> Past:
        inputs, states = (held[run.slots] for held in self.layers[layer])
        inputs[run.begins] = 0
        states[run.begins] = 0
        return Past(inputs, states)

    def write(self, layer: int, run: StateRun, past: Past) -> None:
        for held, new in zip(self.layers[layer], past, strict=True):
            held[run.slots] = new


class StateRun(NamedTuple):
    """Sequences that go on by equally many tokens. rows: int64 [sequences, tokens], theirs in the
    step; slots: int64 [sequences]; begins: bool [sequences], whether nothing was before.
    """

    rows: Tensor
    slots: Tensor
    begins: Tensor


def recur(
    cache: StateCache,
    runs: list[StateRun],
    layer: int,
    rule: DeltaRule,
    mixed: Tensor,
    decay: Tensor,
    rate: Tensor,
) -> Tensor:
    """float32 [tokens, key_heads, group, value_size] of a step's tokens, whose slots go on."""
    delta = rule.delta
    out = decay.new_empty(len(mixed), delta.key_heads, delta.group, delta.value_size)
    for run in runs:
        past = cache.read(layer, run)
        out[run.rows], past = rule(mixed[run.rows], decay[run.rows], rate[run.rows], past)
        cache.write(layer, run, past)
    return out

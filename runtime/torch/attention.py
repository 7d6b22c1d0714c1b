"""Paged attention: where keys and values live, and how one step reads them.

`PagedKVCache` is the memory; `StepAttention` is one iteration's view of it. Which block belongs
to whom is decided elsewhere (`batching/kv_cache.py`).
Source: PagedAttention (Kwon et al., 2023), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.packing import INT8_MAX, to_fp8
from enginehouse.runtime.checkpoint.traits import AttentionRule, Chunked
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.machine.device import CPU, zeros
from enginehouse.runtime.torch.linear_attention import DeltaRule, StateCache, StateRun, recur

_STORAGE = {"FP8": torch.float8_e4m3fn, "INT8": torch.int8}


def kv_storage_dtype(config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """What the cache holds its values in: the compute dtype, or what the engine asks for."""
    algo = config.quantization.kv_cache_quant_algo
    return dtype if algo is None else _STORAGE[algo]


def visible(queries: Tensor, positions: Tensor, window: int | Chunked | None) -> Tensor:
    """bool [queries, positions]: what each query may look at, itself included."""
    queries = queries.unsqueeze(1)
    mask = positions <= queries
    if isinstance(window, Chunked):
        return mask & (positions // window.size == queries // window.size)
    return mask if window is None else mask & (positions > queries - window)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Bound x smoothly to (-cap, cap); x itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: AttentionRule) -> Tensor:
    """q: [heads, tokens, D]; keys, values: [kv_heads, positions, D] -> like q.

    mask: bool [tokens, positions], true where a token may look.
    """
    if rule.soft_cap is None and rule.sinks is None:
        out = functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, scale=rule.scale, enable_gqa=True
        )
        return out.squeeze(0)
    grouped = q.unflatten(0, (keys.shape[0], -1))  # [kv_heads, heads / kv_heads, tokens, D]
    scores = soft_cap(grouped @ keys.unsqueeze(1).mT * rule.scale, rule.soft_cap)
    scores = scores.masked_fill(~mask, float("-inf"))
    sinks = None if rule.sinks is None else rule.sinks.view(len(keys), -1, 1, 1)
    weights = shares(scores, sinks)
    return (weights.to(q.dtype) @ values.unsqueeze(1)).flatten(0, 1)


def shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax over the last dimension, float32; sinks: a score more for each row, of one element
    there, that nothing is read at.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


class PagedKVCache:
    """Keys and values of all blocks, one tensor a layer: [2 * kv_heads, num_blocks * block, D].
    kv_heads: all numbers of them that layers have.

    Heads lead, so that gathered blocks are a batch of matrices without another copy. Zeroed
    at first: a masked position is multiplied by 0, which must not meet NaN. On a CPU untouched
    pages take no memory.

    dtype: of arithmetic. scales: one multiplier a layer when the engine's cache is FP8 or INT8;
    values are then rounded as they are stored, and multiplied again as they are read.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        scales: Sequence[float] = (),
        device: torch.device = CPU,
    ) -> None:
        layers = range(config.num_hidden_layers)
        self.dtype = dtype
        self.storage_dtype = kv_storage_dtype(config, dtype)
        self.scales = tuple(scales)
        assert self.storage_dtype == dtype or len(scales) == config.num_hidden_layers
        # float8 has neither copies nor selections by index: its bytes are kept.
        stored = torch.uint8 if self.storage_dtype == torch.float8_e4m3fn else self.storage_dtype
        self.device = device
        slots = num_blocks * block_size
        shapes = [(heads, slots, size) for heads, size in (_kept(config, i) for i in layers)]
        self.layers = [zeros(shape, stored, device) for shape in shapes]
        self.kv_heads = sorted({heads // 2 for heads, _, _ in shapes if heads})
        self.block_size = block_size
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """dtype: of arithmetic."""
        layers = range(config.num_hidden_layers)
        numbers = sum(heads * size for heads, size in (_kept(config, i) for i in layers))
        return numbers * kv_storage_dtype(config, dtype).itemsize

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store this step's k, v: [tokens, kv_heads, D] at slots: int64 [tokens]."""
        kv = torch.cat([k, v], dim=1).transpose(0, 1)
        self.layers[layer].index_copy_(1, slots, self._stored(layer, kv))

    def read(self, layer: int, blocks: Tensor) -> Tensor:
        """[2 * kv_heads, len(blocks) * block_size, D] in the compute dtype, copied."""
        pool = self.layers[layer].view(self.layers[layer].shape[0], self.num_blocks, -1)
        found = pool.index_select(1, blocks).view(pool.shape[0], -1, self.layers[layer].shape[-1])
        return self._read(layer, found)

    def round_trip(self, layer: int, values: Tensor) -> Tensor:
        """Keys or values as they are after having been stored; any shape."""
        return self._read(layer, self._stored(layer, values))

    def _stored(self, layer: int, values: Tensor) -> Tensor:
        if self.storage_dtype == self.dtype:
            return values
        scaled = values.float() / self.scales[layer]
        if self.storage_dtype == torch.int8:
            return scaled.round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)
        return to_fp8(scaled).view(torch.uint8)

    def _read(self, layer: int, stored: Tensor) -> Tensor:
        if self.storage_dtype == self.dtype:
            return stored
        if self.storage_dtype == torch.float8_e4m3fn:
            stored = stored.view(torch.float8_e4m3fn)
        return stored.to(self.dtype) * self.scales[layer]


def _kept(config: ModelConfig, layer: int) -> tuple[int, int]:
    """The heads of a layer's keys and values, and their size; no heads where it reads others'."""
    own = config.of_layer(layer)
    return 2 * own.num_key_value_heads if config.has_keys(layer) else 0, own.head_size


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of like length that decode one token each.

    tokens: int64 [sequences], their rows in the step; blocks: int64 [sequences * blocks per
    sequence], short ones padded with block 0; masks: for each window and number of KV heads,
    [kv_heads * sequences, 1, positions], 0 or -inf.
    """

    tokens: Tensor
    blocks: Tensor
    masks: Mapping[tuple[int | Chunked | None, int], Tensor]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A run of one prompt's tokens. masks: for each window, bool [tokens, positions]."""

    tokens: slice
    blocks: Tensor
    masks: Mapping[int | Chunked | None, Tensor]


class StepAttention:
    """One iteration's attention; satisfies `model.Attention`."""

    def __init__(
        self,
        cache: PagedKVCache,
        slots: Tensor,
        decodes: list[DecodeGroup],
        chunks: list[PrefillChunk],
        states: StateCache,
        runs: list[StateRun],
    ) -> None:
        self.cache = cache
        self.slots = slots
        self.decodes = decodes
        self.chunks = chunks
        self.states = states
        self.runs = runs
        self.written: set[int] = set()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        if layer not in self.written:  # else by another layer, which reads the same
            self.cache.write(layer, self.slots, k, v)
            self.written.add(layer)
        out = torch.empty_like(q)
        for group in self.decodes:
            out[group.tokens] = self._decode(layer, group, q[group.tokens], rule)
        for chunk in self.chunks:
            out[chunk.tokens] = self._prefill(layer, chunk, q[chunk.tokens], rule)
        return out.flatten(1)

    def recur(
        self, layer: int, rule: DeltaRule, mixed: Tensor, decay: Tensor, rate: Tensor
    ) -> Tensor:
        return recur(self.states, self.runs, layer, rule, mixed, decay, rate)

    def _decode(self, layer: int, group: DecodeGroup, q: Tensor, rule: AttentionRule) -> Tensor:
        """Two batched products: on a CPU several times faster than SDPA for one query token."""
        n, heads, size = q.shape
        kv = self.cache.read(layer, group.blocks)
        kv_heads = kv.shape[0] // 2
        keys, values = kv.view(2, kv_heads * n, -1, size)  # each [kv_heads * n, positions, D]
        grouped = q.view(n, kv_heads, -1, size).transpose(0, 1).reshape(kv_heads * n, -1, size)
        mask = group.masks[rule.window, kv_heads]
        if rule.soft_cap is None:
            scores = torch.baddbmm(mask, grouped, keys.mT, alpha=rule.scale)
        else:
            scores = soft_cap(torch.bmm(grouped, keys.mT) * rule.scale, rule.soft_cap) + mask
        sinks = None
        if rule.sinks is not None:
            sinks = rule.sinks.view(kv_heads, 1, -1, 1).expand(-1, n, -1, 1).flatten(0, 1)
        weights = shares(scores, sinks).to(q.dtype)
        out = torch.bmm(weights, values)  # [kv_heads * n, heads / kv_heads, D]
        return out.view(kv_heads, n, -1, size).transpose(0, 1).reshape(n, heads, size)

    def _prefill(self, layer: int, chunk: PrefillChunk, q: Tensor, rule: AttentionRule) -> Tensor:
        kv = self.cache.read(layer, chunk.blocks)
        keys, values = kv.view(2, kv.shape[0] // 2, -1, q.shape[-1])
        mask = chunk.masks[rule.window]
        return attend(q.transpose(0, 1), keys, values, mask, rule).transpose(0, 1)

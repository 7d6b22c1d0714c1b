"""A layer's attention by heads in TensorRT's layers: projections, norms of heads, and the products.

Knows no norm but those on queries and keys, and sums nothing over ranks.
"""

from __future__ import annotations

import numpy as np

from enginehouse.build.tensorrt.attention_inputs import AttentionInputs
from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.norms import Norms
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.traits import AttentionRule, traits_of
from enginehouse.runtime.config import ModelConfig

# What the compiler has a fused attention for, in 16 bit: these head sizes, and as many query
# heads on a rank (seen with TensorRT-RTX 1.7.1; with fewer it refuses unless it may decompose).
_FUSED_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
_FUSED_HEADS = 4


class Attention:
    """attention(layer, x): what a layer's attention gives, as far as this rank has its heads."""

    def __init__(
        self,
        ops: NetworkOps,
        linear: Linears,
        norms: Norms,
        shared: AttentionInputs,
        config: ModelConfig,
    ) -> None:
        self.ops = ops
        self.linear = linear
        self.norms = norms
        self.shared = shared
        self.config = config
        self.traits = traits_of(config)
        tp = config.mapping.tp_size
        self.heads = config.num_attention_heads // tp
        self.kv_heads = max(1, config.num_key_value_heads // tp)
        size = config.head_size
        with ops.part("inputs"):
            self.query_sizes = shared.sizes_of(shared.tokens, self.heads, size)
            self.key_sizes = shared.sizes_of(shared.tokens, self.kv_heads, size)

    def __call__(self, layer: int, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the layer's."""
        ops, shared, size = self.ops, self.shared, self.config.head_size
        name = f"transformer.layers.{layer}.attention"
        rule = self.traits.rules[layer]
        count = self.heads + 2 * self.kv_heads
        qkv = self._bounded(self.linear(f"{name}.qkv", x))
        qkv = ops.reshape(qkv, (0, 0, count, size), after=(0, 2, 1, 3))
        q = ops.slice(qkv, (0, 0, 0, 0), self.query_sizes)  # [B, heads, T, D]
        k = ops.slice(qkv, (0, self.heads, 0, 0), self.key_sizes)
        v = ops.slice(qkv, (0, self.heads + self.kv_heads, 0, 0), self.key_sizes)
        scale = shared.query_scale(layer)
        if self.traits.l2_norm_heads and self.traits.ropes[layer] is not None:
            q, k = (
                self.norms(f"{name}.qk_l2norm", shared.rotated(layer, each), 4) for each in (q, k)
            )
            q = shared.scaled(q, scale)
        elif f"{name}.q_layernorm.weight" not in self.linear.table:
            q, k = shared.rotated(layer, q, scale), shared.rotated(layer, k)
        elif self.traits.norm_turned_heads:
            q, k = self._normed(name, shared.rotated(layer, q), shared.rotated(layer, k))
            q = shared.scaled(q, scale)
        else:
            q, k = self._normed(name, q, k)
            q, k = shared.rotated(layer, q, scale), shared.rotated(layer, k)
        k, v = (
            shared.cached(side, layer, each, self.kv_heads, size)
            for side, each in (("key", k), ("value", v))
        )
        mask = shared.masks[rule.window]
        if rule.soft_cap is not None:
            out = self._capped(q, k, v, mask, rule)
        elif f"{name}.sinks" in self.linear.table:
            out = self._with_sinks(f"{name}.sinks", q, k, v, mask)
        else:
            out = ops.attention(q, k, v, mask, self._fused(size))
        out = ops.reshape(out, (0, 0, self.heads * size), before=(0, 2, 1, 3))
        return self.linear(f"{name}.dense", out)

    def _bounded(self, x: Value) -> Value:
        """x [B, T, features] within `clip_qkv`, where a model has that."""
        ops, bound = self.ops, self.traits.clip_qkv
        if bound is None:
            return x
        least, most = (ops.cast(ops.number(b, 3), self.config.dtype) for b in (-bound, bound))
        return ops.elementwise("MIN", ops.elementwise("MAX", x, least), most)

    def _normed(self, name: str, q: Value, k: Value) -> tuple[Value, Value]:
        if self.traits.norm_all_heads:
            return self.norms.over_all_heads(name, q, k)
        q = self.norms(f"{name}.q_layernorm", q, 4)
        return q, self.norms(f"{name}.k_layernorm", k, 4)

    def _fused(self, size: int) -> bool:
        """Whether heads of a size must become one kernel, or may be single products."""
        known = size in _FUSED_HEAD_SIZES and self.heads >= _FUSED_HEADS
        return known and self.config.dtype != "float32"

    def _with_sinks(self, name: str, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """Attention that sees one row more, of zeros, at whose score nothing is read.

        The row's score is 0 where a sink has its own, so that all others are less by it, which
        softmax does not tell apart: behind their elements queries have minus their head's sink, and
        keys a one. Heads become as large as the next that have a fused kernel.
        """
        ops, shared, size = self.ops, self.shared, self.config.head_size
        wide = next((n for n in _FUSED_HEAD_SIZES if n > size), size + 1)
        place = np.zeros((1, 1, 1, wide))
        place[..., size] = 1
        sinks = self.linear.input(name, self.config.dtype, (self.heads,))
        less = ops.cast(ops.constant(place), self.config.dtype)
        less = ops.elementwise("PROD", ops.reshape(sinks, (1, -1, 1, 1)), less)
        q = ops.padded(q, shared.sizes_of(shared.tokens, self.heads, wide))
        q = ops.elementwise("SUB", q, less)
        rows = shared.sizes_of(shared.rows, self.kv_heads, wide)
        one_more = ops.elementwise("SUM", rows, ops.constant([0, 0, 1, 0], "int64"))
        one = ops.cast(ops.constant(1.0), self.config.dtype)
        k = ops.padded(ops.padded(k, rows, one), one_more)
        v = ops.padded(v, one_more)
        query = ops.reshape(shared.positions, (0, 1, -1, 1))
        mask = ops.concat([mask, ops.elementwise("EQUAL", query, query)], 3)
        out = ops.attention(q, k, v, mask, self._fused(wide))
        return ops.slice(out, (0, 0, 0, 0), self.query_sizes)

    def _capped(self, q: Value, k: Value, v: Value, mask: Value, rule: AttentionRule) -> Value:
        """Attention in single products, as no fused one bounds its scores.

        Heads are grouped by the key head that they share: [B, kv_heads, heads / kv_heads, T, D].
        """
        ops, size = self.ops, self.config.head_size
        assert rule.soft_cap is not None
        groups = (0, self.kv_heads, self.heads // self.kv_heads, -1, size)
        q = ops.reshape(q, groups)
        k, v = (ops.reshape(x, (0, self.kv_heads, 1, -1, size)) for x in (k, v))
        scores = ops.cast(ops.matmul(q, k, transpose=True), "float32")
        scores = ops.elementwise("PROD", scores, ops.number(rule.scale / rule.soft_cap, 5))
        scores = ops.activation("TANH", scores)
        scores = ops.elementwise("PROD", scores, ops.number(rule.soft_cap, 5))
        mask = ops.reshape(mask, (0, 1, 0, 1, -1), after=(0, 1, 3, 2, 4))
        scores = ops.select(mask, scores, ops.number(float("-inf"), 5))
        weights = ops.cast(ops.softmax(scores, 4), self.config.dtype)
        return ops.reshape(ops.matmul(weights, v), (0, self.heads, -1, size))

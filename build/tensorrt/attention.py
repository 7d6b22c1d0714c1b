"""A layer's attention in TensorRT's layers, and the inputs, masks and caches that layers share.

Knows no norm but those on queries and keys, and sums nothing over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.norms import Norms
from enginehouse.build.tensorrt.ops import NetworkOps, StepInputs, Value
from enginehouse.runtime.checkpoint.traits import AttentionRule, Chunked, traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.tensorrt.inputs import RotaryInputs

# What the compiler has a fused attention for, in 16 bit: these head sizes, and as many query
# heads on a rank (seen with TensorRT-RTX 1.7.1; with fewer it refuses unless it may decompose).
_FUSED_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
_FUSED_HEADS = 4


class Attention:
    """attention(layer, x): what a layer's attention gives, as far as this rank has its heads.

    context: S, the rows of a cache; max_positions: what the rotary tables cover; layers: those of
    the part that attend, of which there is at least one. `caches`: name and tensor of each cache as
    written.
    """

    def __init__(
        self,
        ops: NetworkOps,
        linear: Linears,
        norms: Norms,
        step_input: StepInputs,
        config: ModelConfig,
        context: int,
        max_positions: int,
        layers: Sequence[int],
    ) -> None:
        self.ops = ops
        self.linear = linear
        self.norms = norms
        self.step_input = step_input
        self.config = config
        self.context = context
        self.traits = traits_of(config)
        tp = config.mapping.tp_size
        self.heads = config.num_attention_heads // tp
        self.kv_heads = max(1, config.num_key_value_heads // tp)
        self.caches: list[tuple[str, Value]] = []
        with ops.part("inputs"):
            self._add_inputs(max_positions, layers)

    def _add_inputs(self, max_positions: int, layers: Sequence[int]) -> None:
        """What layers need, and the masks and sizes that they share."""
        ops = self.ops
        self.positions = self.step_input("position_ids", (-1, -1))
        used = {self._rotary_table(layer) for layer in layers} - {None}
        if used:
            self.rotary_ids = self.step_input("rotary_ids", (-1, -1))
        self.write_indices = self.step_input("write_indices", (-1,))
        self.kv_positions = self.step_input("kv_positions", (-1,))
        self.rotary = {
            name: self.linear.input(name, "float32", tuple(table.shape))
            for name, table in RotaryInputs(self.config, max_positions).tables.items()
            if name.partition(".")[0] in used
        }
        growth = self.traits.query_growth
        self.growth = None if growth is None else self._growth(*growth[:2])
        self.masks: dict[int | Chunked | None, Value] = {}
        for window in dict.fromkeys(self.traits.rules[layer].window for layer in layers):
            assert not isinstance(window, Chunked), "the plan has refused it"
            self.masks[window] = self._mask(window)
        size = self.config.head_size
        tokens = ops.shape(ops.reshape(self.positions, (0, 1, -1, 1)))
        rows = ops.shape(ops.reshape(self.kv_positions, (1, 1, -1, 1)))
        batch = ops.shape(ops.reshape(self.write_indices, (0, 1, 1, 1)))
        self.query_sizes, self.key_sizes, self.cache_sizes = (
            ops.elementwise("PROD", known, ops.constant([1, heads, 1, size], "int64"))
            for known, heads in (
                (tokens, self.heads),
                (tokens, self.kv_heads),
                (ops.elementwise("PROD", batch, rows), self.kv_heads),
            )
        )

    def _mask(self, window: int | None) -> Value:
        """bool [B, 1, T, L]: up to the token's own position, and the last `window` of those."""
        ops = self.ops
        query = ops.reshape(self.positions, (0, 1, -1, 1))
        key = ops.reshape(self.kv_positions, (1, 1, 1, -1))
        mask = ops.unary("NOT", ops.elementwise("GREATER", key, query))
        if window is None:
            return mask
        first = ops.elementwise("SUB", query, ops.number(window, 4, "int32"))
        return ops.elementwise("AND", mask, ops.elementwise("GREATER", key, first))

    def __call__(self, layer: int, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the layer's."""
        ops, size = self.ops, self.config.head_size
        name = f"transformer.layers.{layer}.attention"
        rule = self.traits.rules[layer]
        count = self.heads + 2 * self.kv_heads
        qkv = self._bounded(self.linear(f"{name}.qkv", x))
        qkv = ops.reshape(qkv, (0, 0, count, size), after=(0, 2, 1, 3))
        q = ops.slice(qkv, (0, 0, 0, 0), self.query_sizes)  # [B, heads, T, D]
        k = ops.slice(qkv, (0, self.heads, 0, 0), self.key_sizes)
        v = ops.slice(qkv, (0, self.heads + self.kv_heads, 0, 0), self.key_sizes)
        scale = self._query_scale(layer)
        if f"{name}.q_layernorm.weight" not in self.linear.table:
            q, k = self._rotate(layer, q, scale), self._rotate(layer, k)
        elif self.traits.norm_turned_heads:
            q, k = self._normed(name, self._rotate(layer, q), self._rotate(layer, k))
            q = self._scaled(q, scale)
        else:
            q, k = self._normed(name, q, k)
            q, k = self._rotate(layer, q, scale), self._rotate(layer, k)
        k, v = self._cached("key", layer, k), self._cached("value", layer, v)
        mask = self.masks[rule.window]
        if rule.soft_cap is None:
            out = ops.attention(q, k, v, mask, self._fused())
        else:
            out = self._capped(q, k, v, mask, rule)
        out = ops.reshape(out, (0, 0, self.heads * size), before=(0, 2, 1, 3))
        return self.linear(f"{name}.dense", out)

    def _bounded(self, x: Value) -> Value:
        """x [B, T, features] within `clip_qkv`, where a model has that."""
        ops, bound = self.ops, self.traits.clip_qkv
        if bound is None:
            return x
        least, most = (ops.cast(ops.number(b, 3), self.config.dtype) for b in (-bound, bound))
        return ops.elementwise("MIN", ops.elementwise("MAX", x, least), most)

    def _query_scale(self, layer: int) -> Value | None:
        """What a layer's queries are multiplied by, float32 [1 or B, 1, 1 or T, 1]; None for 1."""
        ops, rule = self.ops, self.traits.rules[layer]
        scale = None if rule.soft_cap is not None else ops.number(rule.scale, 4)
        if self.growth is None or self.traits.ropes[layer] is None:
            return scale
        return self.growth if scale is None else ops.elementwise("PROD", self.growth, scale)

    def _growth(self, beta: float, length: int) -> Value:
        """1 + beta * ln(1 + position // length): float32 [B, 1, T, 1]."""
        ops = self.ops
        wide = ops.cast(ops.reshape(self.positions, (0, 1, -1, 1)), "float32")
        steps = ops.unary("FLOOR", ops.elementwise("DIV", wide, ops.number(length, 4)))
        steps = ops.unary("LOG", ops.elementwise("SUM", steps, ops.number(1, 4)))
        grown = ops.elementwise("PROD", steps, ops.number(beta, 4))
        return ops.elementwise("SUM", grown, ops.number(1, 4))

    def _normed(self, name: str, q: Value, k: Value) -> tuple[Value, Value]:
        if self.traits.norm_all_heads:
            return self.norms.over_all_heads(name, q, k)
        q = self.norms(f"{name}.q_layernorm", q, 4)
        return q, self.norms(f"{name}.k_layernorm", k, 4)

    def _fused(self) -> bool:
        """Whether attention must become one kernel, or may be single products."""
        known = self.config.head_size in _FUSED_HEAD_SIZES and self.heads >= _FUSED_HEADS
        return known and self.config.dtype != "float32"

    def _rotary_table(self, layer: int) -> str | None:
        rope = self.traits.ropes[layer]
        return None if rope is None else ("rotary", "rotary_local")[rope]

    def _rotate(self, layer: int, x: Value, scale: Value | None = None) -> Value:
        """x [B, heads, T, D] turned by its positions and scaled, both in float32."""
        ops = self.ops
        table = self._rotary_table(layer)
        wide = ops.cast(x, "float32")
        if table is not None:
            cos, sin = self.rotary[f"{table}.cos"], self.rotary[f"{table}.sin"]
            how = self.config.rotary_dim, self.traits.rope_interleaved
            wide = ops.rotary(wide, cos, sin, self.rotary_ids, *how)
        return self._scaled(wide, scale)

    def _scaled(self, x: Value, scale: Value | None) -> Value:
        """x times a scale, multiplied in float32, in the model's dtype."""
        ops = self.ops
        if scale is not None:
            x = ops.elementwise("PROD", ops.cast(x, "float32"), scale)
        return ops.cast(x, self.config.dtype)

    def _cached(self, side: str, layer: int, update: Value) -> Value:
        """This step's keys or values behind the earlier ones: the cache's first L rows."""
        shape = (-1, self.kv_heads, self.context, self.config.head_size)
        local = layer - self.linear.first_layer
        cache = self.step_input(f"past_{side}_{local}", shape, self.config.dtype)
        present = self.ops.update_cache(cache, update, self.write_indices)
        self.caches.append((f"present_{side}_{local}", present))
        return self.ops.slice(present, (0, 0, 0, 0), self.cache_sizes)

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

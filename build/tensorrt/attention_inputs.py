"""What a network's attention layers share: positions, masks, rotary tables, and their caches.

Knows no weight and no product.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, StepInputs, Value
from enginehouse.runtime.checkpoint.traits import Chunked, traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.tensorrt.inputs import RotaryInputs


class AttentionInputs:
    """Adds the inputs that the attention of `layers` needs, of which there is at least one.

    context: S, the rows of a cache; max_positions: what the rotary tables cover. `masks`: of each
    window, bool [B, 1, T, L]. `caches`: name and tensor of each cache as written.
    """

    def __init__(
        self,
        ops: NetworkOps,
        linear: Linears,
        step_input: StepInputs,
        config: ModelConfig,
        context: int,
        max_positions: int,
        layers: Sequence[int],
    ) -> None:
        self.ops = ops
        self.linear = linear
        self.step_input = step_input
        self.config = config
        self.context = context
        self.traits = traits_of(config)
        self.caches: list[tuple[str, Value]] = []
        with ops.part("inputs"):
            self._add(max_positions, layers)

    def _add(self, max_positions: int, layers: Sequence[int]) -> None:
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
        self.growth = None if growth is None else self._growth(*growth)
        windows = dict.fromkeys(self.traits.rules[layer].window for layer in layers)
        self.masks = {window: self._mask(window) for window in windows}
        self.tokens = ops.shape(ops.reshape(self.positions, (0, 1, -1, 1)))  # B, 1, T, 1
        rows = ops.shape(ops.reshape(self.kv_positions, (1, 1, -1, 1)))
        batch = ops.shape(ops.reshape(self.write_indices, (0, 1, 1, 1)))
        self.rows = ops.elementwise("PROD", batch, rows)  # B, 1, L, 1

    def _mask(self, window: int | Chunked | None) -> Value:
        """bool [B, 1, T, L]: up to the token's position, of the last `window` or of its chunk."""
        ops = self.ops
        query = ops.reshape(self.positions, (0, 1, -1, 1))
        key = ops.reshape(self.kv_positions, (1, 1, 1, -1))
        mask = ops.unary("NOT", ops.elementwise("GREATER", key, query))
        if window is None:
            return mask
        if isinstance(window, Chunked):
            size = ops.number(window.size, 4, "int32")
            chunks = (ops.elementwise("FLOOR_DIV", at, size) for at in (key, query))
            return ops.elementwise("AND", mask, ops.elementwise("EQUAL", *chunks))
        first = ops.elementwise("SUB", query, ops.number(window, 4, "int32"))
        return ops.elementwise("AND", mask, ops.elementwise("GREATER", key, first))

    def _growth(self, beta: float, length: int, first: int) -> Value:
        """1 + beta * ln(1 + (position + first) // length): float32 [B, 1, T, 1]."""
        ops = self.ops
        counted = ops.reshape(self.positions, (0, 1, -1, 1))
        counted = ops.elementwise("SUM", counted, ops.number(first, 4, "int32"))
        wide = ops.cast(counted, "float32")
        steps = ops.unary("FLOOR", ops.elementwise("DIV", wide, ops.number(length, 4)))
        steps = ops.unary("LOG", ops.elementwise("SUM", steps, ops.number(1, 4)))
        grown = ops.elementwise("PROD", steps, ops.number(beta, 4))
        return ops.elementwise("SUM", grown, ops.number(1, 4))

    def sizes_of(self, known: Value, heads: int, size: int) -> Value:
        """int64 [4]: those of `tokens` or `rows` for so many heads of a size."""
        factors = self.ops.constant([1, heads, 1, size], "int64")
        return self.ops.elementwise("PROD", known, factors)

    def query_scale(self, layer: int) -> Value | None:
        """What a layer's queries are multiplied by, float32 [1 or B, 1, 1 or T, 1]; None for 1."""
        ops, rule = self.ops, self.traits.rules[layer]
        scale = None if rule.soft_cap is not None else ops.number(rule.scale, 4)
        grows = (self.traits.ropes[layer] is None) == self.traits.grows_unturned
        if self.growth is None or not grows:
            return scale
        return self.growth if scale is None else ops.elementwise("PROD", self.growth, scale)

    def _rotary_table(self, layer: int) -> str | None:
        rope = self.traits.ropes[layer]
        return None if rope is None else ("rotary", "rotary_local")[rope]

    def rotated(self, layer: int, x: Value, scale: Value | None = None) -> Value:
        """x [B, heads, T, D] turned by its positions and scaled, both in float32."""
        ops = self.ops
        table = self._rotary_table(layer)
        wide = ops.cast(x, "float32")
        if table is not None:
            cos, sin = self.rotary[f"{table}.cos"], self.rotary[f"{table}.sin"]
            how = self.config.rotary_dim, self.traits.rope_interleaved
            wide = ops.rotary(wide, cos, sin, self.rotary_ids, *how)
        return self.scaled(wide, scale)

    def scaled(self, x: Value, scale: Value | None) -> Value:
        """x times a scale, multiplied in float32, in the model's dtype."""
        ops = self.ops
        if scale is not None:
            x = ops.elementwise("PROD", ops.cast(x, "float32"), scale)
        return ops.cast(x, self.config.dtype)

    def cached(self, side: str, layer: int, update: Value, heads: int, size: int) -> Value:
        """This step's keys or values [B, heads, T, size] behind the earlier ones: the cache's first
        L rows.
        """
        local = layer - self.linear.first_layer
        shape = (-1, heads, self.context, size)
        cache = self.step_input(f"past_{side}_{local}", shape, self.config.dtype)
        present = self.ops.update_cache(cache, update, self.write_indices)
        self.caches.append((f"present_{side}_{local}", present))
        return self.ops.slice(present, (0, 0, 0, 0), self.sizes_of(self.rows, heads, size))

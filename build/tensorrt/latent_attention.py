"""A layer's latent attention in TensorRT's layers: keys and values stay as they were compressed.

All heads of a rank attend to one head of latents, which the cache holds once: what makes keys of
them is multiplied into the queries, and what makes values into what attention gives. Sums nothing
over ranks. Source: DeepSeek-V2 (2024), section 2.1 and appendix C.
"""

from __future__ import annotations

from enginehouse.build.tensorrt.attention_inputs import AttentionInputs
from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.norms import Norms
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig

_EPSILON = 1e-6  # of the latents' norms; transformers' classes have it written in


class LatentAttention:
    """attention(layer, x): what a layer's attention gives, as far as this rank has its heads."""

    def __init__(
        self,
        ops: NetworkOps,
        linear: Linears,
        norms: Norms,
        shared: AttentionInputs,
        config: ModelConfig,
    ) -> None:
        assert config.latent is not None
        self.ops = ops
        self.linear = linear
        self.norms = norms
        self.shared = shared
        self.config = config
        self.latent = config.latent
        self.rules = traits_of(config).rules
        self.heads = config.num_attention_heads // config.mapping.tp_size

    def __call__(self, layer: int, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the layer's."""
        ops, shared, latent = self.ops, self.shared, self.latent
        name = f"transformer.layers.{layer}.attention"
        latents = self._latents(layer, name, x)
        latents = shared.cached("key", layer, latents, 1, self.config.head_size)
        of_keys, of_values = self._of_latents(f"{name}.kv_b.weight")
        q = self._queries(layer, name, x, of_keys)
        out = self._attended(q, latents, shared.masks[self.rules[layer].window])
        out = ops.matmul(out, of_values, transpose=True)  # [B, heads, T, value]
        out = ops.reshape(out, (0, 0, self.heads * latent.value), before=(0, 2, 1, 3))
        return self.linear(f"{name}.dense", out)

    def _latents(self, layer: int, name: str, x: Value) -> Value:
        """This step's: [B, 1, T, rank + rope], the last of which are turned."""
        ops, latent = self.ops, self.latent
        kv = ops.reshape(self.linear(f"{name}.kv_a", x), (0, 1, -1, self.config.head_size))
        compressed = self._cut(kv, 0, latent.rank, 1)
        compressed = self.norms(f"{name}.kv_a_layernorm", compressed, 4, _EPSILON)
        turned = self.shared.rotated(layer, self._cut(kv, latent.rank, latent.rope, 1))
        return ops.concat([compressed, turned], 3)

    def _queries(self, layer: int, name: str, x: Value, of_keys: Value) -> Value:
        """[B, heads, T, rank + rope], scaled."""
        ops, shared, latent = self.ops, self.shared, self.latent
        size = latent.nope + latent.rope
        if latent.query_rank:
            compressed = self.linear(f"{name}.q_a", x)
            compressed = self.norms(f"{name}.q_a_layernorm", compressed, 3, _EPSILON)
            q = self.linear(f"{name}.q_b", compressed)
        else:
            q = self.linear(f"{name}.q", x)
        q = ops.reshape(q, (0, 0, self.heads, size), after=(0, 2, 1, 3))
        scale = shared.query_scale(layer)
        plain = ops.matmul(self._cut(q, 0, latent.nope, self.heads), of_keys)
        turned = self._cut(q, latent.nope, latent.rope, self.heads)
        return ops.concat([shared.scaled(plain, scale), shared.rotated(layer, turned, scale)], 3)

    def _attended(self, q: Value, latents: Value, mask: Value) -> Value:
        """What is read of the latents [B, 1, L, rank + rope]: [B, heads, T, rank].

        In single products, as no fused kernel has heads as large; all heads of a sequence are rows
        of one product, for which nothing is copied for each of them.
        """
        ops, latent, heads = self.ops, self.latent, self.heads
        rows = ops.reshape(q, (0, 1, -1, self.config.head_size))
        scores = ops.reshape(ops.matmul(rows, latents, transpose=True), (0, heads, -1, 0))
        scores = ops.cast(scores, "float32")  # [B, heads, T, L]
        scores = ops.select(mask, scores, ops.number(float("-inf"), 4))
        weights = ops.cast(ops.softmax(scores, 3), self.config.dtype)
        weights = ops.reshape(weights, (0, 1, -1, 0))
        sizes = self.shared.sizes_of(self.shared.rows, 1, latent.rank)
        out = ops.matmul(weights, ops.slice(latents, (0, 0, 0, 0), sizes))
        return ops.reshape(out, (0, heads, -1, latent.rank))

    def _of_latents(self, name: str) -> tuple[Value, Value]:
        """What makes keys of latents, [1, heads, nope, rank], and values, with as many `value`."""
        ops, latent, heads = self.ops, self.latent, self.heads
        weight = self.linear.input(name, self.config.dtype, self.linear.table[name].shape)
        both = ops.reshape(weight, (1, heads, latent.nope + latent.value, latent.rank))
        sizes = ((1, heads, rows, latent.rank) for rows in (latent.nope, latent.value))
        keys, values = (ops.constant(each, "int64") for each in sizes)
        return ops.slice(both, (0, 0, 0, 0), keys), ops.slice(both, (0, 0, latent.nope, 0), values)

    def _cut(self, x: Value, first: int, size: int, heads: int) -> Value:
        """Of x [B, heads, T, D] the `size` elements of each head from `first` on."""
        sizes = self.shared.sizes_of(self.shared.tokens, heads, size)
        return self.ops.slice(x, (0, 0, 0, first), sizes)

"""The decoder's norms in TensorRT's layers, in float32. Knows no sublayer."""

from __future__ import annotations

from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.config import ModelConfig


class Norms:
    """norms(module, x): x divided by its RMS over the last axis, times the module's weight,
    where it has one.

    Of a model with LayerNorm its mean is taken off first, and where the module has a bias, that is
    added.
    """

    def __init__(self, ops: NetworkOps, linear: Linears, config: ModelConfig) -> None:
        self.ops = ops
        self.linear = linear
        self.config = config

    def __call__(self, module: str, x: Value, rank: int = 3, epsilon: float | None = None) -> Value:
        """x: floating, of `rank` axes -> the same shape in the model's dtype. epsilon: the model's
        unless given.
        """
        ops = self.ops
        with ops.part(module.rpartition(".")[2]):
            wide = ops.cast(x, "float32")
            if self.config.layer_norm:
                wide = ops.elementwise("SUB", wide, ops.reduce("AVG", wide, rank - 1))
            mean = ops.reduce("AVG", ops.elementwise("PROD", wide, wide), rank - 1)
            wide = self._divided(wide, mean, rank, epsilon)
            if f"{module}.weight" in self.linear.table:
                weight = self.linear.vector(f"{module}.weight", rank, "float32")
                wide = ops.elementwise("PROD", wide, weight)
            if f"{module}.bias" in self.linear.table:
                bias = self.linear.vector(f"{module}.bias", rank, "float32")
                wide = ops.elementwise("SUM", wide, bias)
            return ops.cast(wide, self.config.dtype)

    def over_all_heads(self, name: str, q: Value, k: Value) -> tuple[Value, Value]:
        """q [B, heads, T, D] and k [B, kv_heads, T, D], each over all of its heads together,
        by RMS.

        The mean over all ranks' heads is the mean of the ranks' means, also where several ranks
        hold a key head; those of q and of k are exchanged as one.
        """
        ops, tp = self.ops, self.config.mapping.tp_size
        with ops.part("qk_layernorm"):
            wide = [ops.cast(x, "float32") for x in (q, k)]
            means = [ops.reduce("AVG", ops.elementwise("PROD", x, x), 1, 3) for x in wide]
            if tp > 1:
                both = ops.all_reduce(ops.concat(means, 1), tp)  # [B, 2, T, 1]
                both = ops.elementwise("PROD", both, ops.number(1 / tp, 4))
                means = [ops.gather(both, ops.constant([i], "int32"), 1) for i in (0, 1)]
            q, k = (self._divided(x, mean, 4) for x, mean in zip(wide, means, strict=True))
            q, k = (self._by_heads(f"{name}.{one}_layernorm", x) for one, x in (("q", q), ("k", k)))
        return q, k

    def _divided(self, wide: Value, mean: Value, rank: int, epsilon: float | None = None) -> Value:
        """By the root of the mean square."""
        ops = self.ops
        least = self.config.norm_epsilon if epsilon is None else epsilon
        mean = ops.elementwise("SUM", mean, ops.number(least, rank))
        return ops.elementwise("DIV", wide, ops.unary("SQRT", mean))

    def _by_heads(self, module: str, wide: Value) -> Value:
        """wide, float32 [B, heads, T, D], times the weights of the rank's heads."""
        ops, config = self.ops, self.config
        name, size, tp = f"{module}.weight", config.head_size, config.mapping.tp_size
        rows = max(size, self.linear.table[name].shape[0] // tp)  # a head at least
        weight = self.linear.input(name, config.dtype, (rows,))
        weight = ops.cast(ops.reshape(weight, (1, rows // size, 1, size)), "float32")
        return ops.cast(ops.elementwise("PROD", wide, weight), config.dtype)

"""The decoder's norms in TensorRT's layers, in float32. Knows no sublayer."""

from __future__ import annotations

from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.config import ModelConfig


class Norms:
    """norms(module, x): x divided by its RMS over the last axis, times the module's weight.

    Of a model with LayerNorm its mean is taken off first, and where the module has a bias, that is
    added.
    """

    def __init__(self, ops: NetworkOps, linear: Linears, config: ModelConfig) -> None:
        self.ops = ops
        self.linear = linear
        self.config = config

    def __call__(self, module: str, x: Value, rank: int = 3) -> Value:
        """x: floating, of `rank` axes -> the same shape in the model's dtype."""
        ops = self.ops
        with ops.part(module.rpartition(".")[2]):
            wide = ops.cast(x, "float32")
            if self.config.layer_norm:
                wide = ops.elementwise("SUB", wide, ops.reduce("AVG", wide, rank - 1))
            mean = ops.reduce("AVG", ops.elementwise("PROD", wide, wide), rank - 1)
            mean = ops.elementwise("SUM", mean, ops.number(self.config.norm_epsilon, rank))
            wide = ops.elementwise("DIV", wide, ops.unary("SQRT", mean))
            weight = self.linear.vector(f"{module}.weight", rank, "float32")
            wide = ops.elementwise("PROD", wide, weight)
            if f"{module}.bias" in self.linear.table:
                bias = self.linear.vector(f"{module}.bias", rank, "float32")
                wide = ops.elementwise("SUM", wide, bias)
            return ops.cast(wide, self.config.dtype)

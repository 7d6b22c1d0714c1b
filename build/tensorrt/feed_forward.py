"""A layer's MLP in TensorRT's layers. Knows no norm, and sums nothing over ranks."""

from __future__ import annotations

from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig


def activated(ops: NetworkOps, x: Value, activation: str) -> Value:
    """activation: silu, gelu (its tanh form), gelu_erf or relu2."""
    if activation in ("gelu", "gelu_erf"):
        return ops.activation("GELU_TANH" if activation == "gelu" else "GELU_ERF", x)
    if activation == "relu2":
        x = ops.activation("RELU", x)
        return ops.elementwise("PROD", x, x)
    return ops.elementwise("PROD", x, ops.activation("SIGMOID", x))


class FeedForward:
    """feed_forward(module, x): the MLP of that name, as far as this rank has it."""

    def __init__(self, ops: NetworkOps, linear: Linears, config: ModelConfig) -> None:
        self.ops = ops
        self.linear = linear
        self.config = config
        self.activation = traits_of(config).activation

    def __call__(self, module: str, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the MLP's."""
        ops = self.ops
        if not self.config.gated_mlp:
            product = activated(ops, self.linear(f"{module}.fc", x), self.activation)
            return self.linear(f"{module}.proj", product)
        if self.config.gate_in_fc:
            inner = self.linear.table[f"{module}.proj.weight"].shape[-1]
            both = ops.reshape(self.linear(f"{module}.fc", x), (0, 0, 2, inner))
            up, gate = (ops.gather(both, ops.constant(i, "int32"), 2) for i in (0, 1))
        else:
            gate, up = self.linear(f"{module}.fc", x), self.linear(f"{module}.gate", x)
        product = ops.elementwise("PROD", activated(ops, gate, self.activation), up)
        return self.linear(f"{module}.proj", product)

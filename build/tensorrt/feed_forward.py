"""A layer's MLP in TensorRT's layers. Knows no norm, and sums nothing over ranks.

Source: GLU Variants Improve Transformer (Shazeer, 2020); the clamped form is GPT-OSS's (OpenAI,
2025).
"""

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


def gated(ops: NetworkOps, gate: Value, up: Value, config: ModelConfig, rank: int) -> Value:
    """act(gate) * up, both of `rank` axes, or the clamped form, in which up is one more."""
    traits = traits_of(config)
    if traits.swiglu_limit is None:
        return ops.elementwise("PROD", activated(ops, gate, traits.activation), up)

    def number(value: float) -> Value:
        return ops.cast(ops.number(value, rank), config.dtype)

    most = number(traits.swiglu_limit)
    gate = ops.elementwise("MIN", gate, most)
    up = ops.elementwise("MAX", ops.elementwise("MIN", up, most), number(-traits.swiglu_limit))
    wide = ops.elementwise("PROD", ops.cast(gate, "float32"), ops.number(traits.swiglu_alpha, rank))
    open_by = ops.cast(ops.activation("SIGMOID", wide), config.dtype)  # alpha is no 16-bit number
    gate = ops.elementwise("PROD", gate, open_by)
    return ops.elementwise("PROD", gate, ops.elementwise("SUM", up, number(1)))


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
        return self.linear(f"{module}.proj", gated(ops, gate, up, self.config, 3))

"""A layer's mixture of experts in TensorRT's layers: all experts of every token, in two products.

The plan's inputs hold the experts of a layer side by side (`bound_weights`): one product gives what
each makes of a token, the other adds up what they give, once it is multiplied by the token's share
of each, which is zero for those that are not chosen. So a step reads all experts and computes
all, as TensorRT-RTX has no layer that leaves some out. Sums nothing over ranks.
Source: Mixtral of Experts (Jiang et al., 2024), section 2.1.
"""

from __future__ import annotations

from enginehouse.build.tensorrt.feed_forward import activated
from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.routing import routing_of
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig


class Experts:
    """experts(name, x): the mixture of the layer of that name, as far as this rank has it."""

    def __init__(self, ops: NetworkOps, linear: Linears, config: ModelConfig) -> None:
        self.ops = ops
        self.linear = linear
        self.config = config
        self.activation = traits_of(config).activation
        self.count = config.num_experts
        self.routing = routing_of(config)
        self.inner = config.moe_intermediate_size // config.mapping.tp_size

    def __call__(self, name: str, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the mixture's."""
        ops, count, inner = self.ops, self.count, self.inner
        with ops.part("mlp.router"):
            shares = self._shares(f"{name}.mlp.router", x)
        with ops.part("mlp.fc"):
            both = ops.reshape(self._opened(f"{name}.mlp.fc", x), (0, 0, count, 2, inner))
        up, gate = (ops.gather(both, ops.constant(i, "int32"), 3) for i in (0, 1))
        product = ops.elementwise("PROD", activated(ops, gate, self.activation), up)
        with ops.part("mlp.proj"):
            return self._closed(f"{name}.mlp.proj", product, shares)

    def _shares(self, module: str, x: Value) -> Value:
        """float32 [B, T, experts, 1]: the softmax over all where an expert is chosen, else zero."""
        ops, chosen = self.ops, self.routing.chosen
        shape = self.linear.table[f"{module}.weight"].shape
        router = self.linear.input(f"{module}.weight", "float32", shape)
        logits = self.linear.multiply(ops.cast(x, "float32"), router, shape, True)
        shares, experts = ops.top_k(ops.softmax(logits, 2), chosen, 2)  # [B, T, chosen]
        if self.routing.renormalize:
            shares = ops.elementwise("DIV", shares, ops.reduce("SUM", shares, 2))
        shares, experts = (ops.reshape(one, (0, 0, chosen, 1)) for one in (shares, experts))
        every = ops.constant([[[range(self.count)]]], "int32")
        is_it = ops.cast(ops.elementwise("EQUAL", experts, every), "float32")
        spread = ops.reduce("SUM", ops.elementwise("PROD", is_it, shares), 2)
        return ops.reshape(spread, (0, 0, self.count, 1))

    def _opened(self, module: str, x: Value) -> Value:
        """[B, T, hidden_size] -> [B, T, experts * 2 * inner]: of each expert up, then gate."""
        shape = (self.count * 2 * self.inner, self.config.hidden_size)
        if not self._is_fp8(module):
            weight = self.linear.input(f"{module}.weight", self.config.dtype, shape)
            return self.linear.multiply(x, weight, shape, True)
        x = self.linear.rounded(module, x)
        scale = self.linear.input(f"{module}.weights_scaling_factor", "float32", shape[:1])
        weight = self.linear.input(f"{module}.weight", "float8_e4m3fn", shape)
        weight = self.ops.dequantize(weight, scale, self.config.dtype, axis=0)
        return self.linear.multiply(x, weight, shape, True)

    def _closed(self, module: str, x: Value, shares: Value) -> Value:
        """[B, T, experts, inner] -> [B, T, hidden_size], each expert's by its share.

        FP8: the experts' scales differ along what is summed. x is rounded, then multiplied by its
        expert's scale over the largest; the largest is the weight's.
        """
        ops, dtype = self.ops, self.config.dtype
        shape = (self.config.hidden_size, self.count * self.inner)
        weight_dtype = "float8_e4m3fn" if self._is_fp8(module) else dtype
        weight = self.linear.input(f"{module}.weight", weight_dtype, shape)
        if self._is_fp8(module):
            x = self.linear.rounded(module, x)
            largest = self.linear.input(f"{module}.weights_scaling_factor", "float32", ())
            weight = ops.dequantize(weight, largest, dtype)
            scales = self.linear.input(f"{module}.expert_scales", "float32", (self.count,))
            scales = ops.reshape(scales, (1, 1, self.count, 1))
            shares = ops.elementwise("PROD", shares, scales)
        x = ops.elementwise("PROD", x, ops.cast(shares, dtype))
        return self.linear.multiply(ops.reshape(x, (0, 0, shape[1])), weight, shape, True)

    def _is_fp8(self, module: str) -> bool:
        return self.linear.table[f"{module}.weight"].dtype == "float8_e4m3fn"

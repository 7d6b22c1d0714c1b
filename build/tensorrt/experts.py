"""A layer's mixture of experts in TensorRT's layers: all experts of every token, in two products.

The plan's inputs hold the experts of a layer side by side (`bound_weights`): one product gives what
each makes of a token, the other adds up what they give, once it is multiplied by the token's share
of each, which is zero for those that are not chosen. So a step reads all experts and computes
all, as TensorRT-RTX has no layer that leaves some out. Sums nothing over ranks.
Source: Mixtral of Experts (Jiang et al., 2024), section 2.1; DeepSeek-V3 Technical Report (2024),
section 2.1.2; GRIN (Liu et al., 2024), as Phi-3.5-MoE computes it.
"""

from __future__ import annotations

from math import prod

from enginehouse.build.tensorrt.feed_forward import FeedForward, gated
from enginehouse.build.tensorrt.linear import Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.routing import routing_of
from enginehouse.runtime.config import ModelConfig


class Experts:
    """experts(module, x): the mixture of that name, as far as this rank has it. plain: of the
    expert that every token sees, where there is one.
    """

    def __init__(
        self, ops: NetworkOps, linear: Linears, plain: FeedForward, config: ModelConfig
    ) -> None:
        self.ops = ops
        self.linear = linear
        self.plain = plain
        self.config = config
        self.count = config.num_experts
        self.routing = routing_of(config)
        self.inner = config.moe_intermediate_size // config.mapping.tp_size

    def __call__(self, module: str, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape; the ranks' add up to the mixture's."""
        ops = self.ops
        with ops.part("mlp.router"):
            shares = self._shares(f"{module}.router", x)
        if self.routing.scales_inputs:
            given = self._added(self._routed(module, *self._apart(x, shares)))
        else:
            given = self._routed(module, x, shares)
        if f"{module}.shared_expert.fc.weight" not in self.linear.table:
            return given
        return ops.elementwise("SUM", given, self._shared(module, x))

    def _routed(self, module: str, x: Value, shares: Value) -> Value:
        """What the experts give of x by these shares, [B, T, hidden_size]."""
        ops = self.ops
        with ops.part("mlp.fc"):
            both = self._opened(f"{module}.fc", x)
            both = ops.reshape(both, (0, 0, self.count, 2, self.inner))
        up, gate = (ops.gather(both, ops.constant(i, "int32"), 3) for i in (0, 1))
        product = gated(ops, gate, up, self.config, 4)
        with ops.part("mlp.proj"):
            return self._closed(f"{module}.proj", product, shares)

    def _apart(self, x: Value, shares: Value) -> tuple[Value, Value]:
        """Where shares are of what enters: the tokens once for each expert that they have chosen,
        [B, chosen * T, hidden_size], multiplied by its share, and all of that expert as shares.
        """
        ops, chosen = self.ops, self.routing.chosen
        best, places = ops.top_k(ops.reshape(shares, (0, 0, self.count)), chosen, 2)
        tokens, marks = [], []
        for index in range(chosen):
            at = ops.constant([index], "int32")
            share = ops.cast(ops.gather(best, at, 2), self.config.dtype)
            tokens.append(ops.elementwise("PROD", x, share))
            marks.append(self._marked(ops.gather(places, at, 2), 1, self.count))
        marked = ops.reshape(ops.concat(marks, 1), (0, 0, self.count, 1))
        return ops.concat(tokens, 1), marked

    def _added(self, given: Value) -> Value:
        """[B, chosen * T, hidden_size] of `_apart`'s tokens -> [B, T, hidden_size]."""
        ops, size = self.ops, self.config.hidden_size
        given = ops.reshape(given, (0, self.routing.chosen, -1, size))
        return ops.reshape(ops.reduce("SUM", given, 1), (0, -1, size))

    def _shared(self, module: str, x: Value) -> Value:
        """What every token's expert gives, times the sigmoid of a gate where it has one."""
        ops, name = self.ops, f"{module}.shared_expert_gate.weight"
        given = self.plain(f"{module}.shared_expert", x)
        if name not in self.linear.table:
            return given
        with ops.part("mlp.shared_expert_gate"):
            shape = self.linear.table[name].shape
            gate = self.linear.input(name, self.config.dtype, shape)
            gate = self.linear.multiply(x, gate, shape, True)  # [B, T, 1]
            return ops.elementwise("PROD", given, ops.activation("SIGMOID", gate))

    def _shares(self, module: str, x: Value) -> Value:
        """float32 [B, T, experts, 1]: a token's share of each expert, zero of those not chosen."""
        ops, routing = self.ops, self.routing
        logits = self._logits(module, x)
        if routing.mixer_epsilon:
            return ops.reshape(self._mixed(logits), (0, 0, self.count, 1))
        scores, judged = self._scores(module, logits)
        _, experts = ops.top_k(judged, routing.chosen, 2)
        shares = ops.elementwise("PROD", scores, self._marked(experts, routing.chosen, self.count))
        if routing.renormalize:
            total = ops.elementwise("SUM", ops.reduce("SUM", shares, 2), ops.number(1e-20, 3))
            shares = ops.elementwise("DIV", shares, total)
        if routing.scale != 1.0:
            shares = ops.elementwise("PROD", shares, ops.number(routing.scale, 3))
        return ops.reshape(shares, (0, 0, self.count, 1))

    def _logits(self, module: str, x: Value) -> Value:
        """The router's, float32 [B, T, experts]."""
        shape = self.linear.table[f"{module}.weight"].shape
        router = self.linear.input(f"{module}.weight", "float32", shape)
        logits = self.linear.multiply(self.ops.cast(x, "float32"), router, shape, True)
        return self._with_bias(module, logits, "float32")

    def _mixed(self, logits: Value) -> Value:
        """SparseMixer's shares, of the logits' shape: the best expert's softmax over those that are
        nearly as good, then, without it, the next's.
        """
        ops, none, shares = self.ops, self.ops.number(float("-inf"), 3), None
        left, magnitudes = logits, ops.unary("ABS", logits)
        for _ in range(self.routing.chosen):
            best, expert = ops.top_k(left, 1, 2)
            below = ops.elementwise("SUB", best, logits)
            below = ops.elementwise("DIV", below, ops.elementwise("MAX", magnitudes, best))
            far = ops.elementwise("GREATER", below, ops.number(2 * self.routing.mixer_epsilon, 3))
            marked = self._marked(expert, 1, self.count)
            share = ops.elementwise("PROD", marked, ops.softmax(ops.select(far, none, left), 2))
            shares = share if shares is None else ops.elementwise("SUM", shares, share)
            left = ops.select(ops.elementwise("GREATER", marked, ops.number(0, 3)), none, left)
        return shares

    def _scores(self, module: str, logits: Value) -> tuple[Value, Value]:
        """Of the router, float32 [B, T, experts], and by what experts are chosen."""
        ops, linear, routing = self.ops, self.linear, self.routing
        scores = ops.activation("SIGMOID", logits) if routing.sigmoid else ops.softmax(logits, 2)
        judged, correction = scores, f"{module}.e_score_correction_bias"
        if correction in linear.table:
            added = linear.input(correction, "float32", (self.count,))
            added = ops.reshape(added, (1, 1, -1))
            judged = ops.elementwise("SUM", scores, added)
        if routing.chosen_groups < routing.groups:
            judged = self._in_best_groups(judged)
        return scores, judged

    def _in_best_groups(self, judged: Value) -> Value:
        """Minus infinity in all groups but the best, by the sum of their largest."""
        ops, routing = self.ops, self.routing
        groups = ops.reshape(judged, (0, 0, routing.groups, self.count // routing.groups))
        best, _ = ops.top_k(groups, routing.group_best, 3)
        best = ops.reshape(ops.reduce("SUM", best, 3), (0, 0, routing.groups))
        _, chosen = ops.top_k(best, routing.chosen_groups, 2)
        marked = self._marked(chosen, routing.chosen_groups, routing.groups)
        marked = ops.elementwise("GREATER", marked, ops.number(0, 3))
        marked = ops.reshape(marked, (0, 0, routing.groups, 1))
        groups = ops.select(marked, groups, ops.number(float("-inf"), 4))
        return ops.reshape(groups, (0, 0, self.count))

    def _marked(self, places: Value, chosen: int, count: int) -> Value:
        """float32 [B, T, count]: one at the places, int32 [B, T, chosen], else zero."""
        ops = self.ops
        every = ops.constant([[[range(count)]]], "int32")
        equal = ops.elementwise("EQUAL", ops.reshape(places, (0, 0, chosen, 1)), every)
        return ops.reshape(ops.reduce("SUM", ops.cast(equal, "float32"), 2), (0, 0, count))

    def _opened(self, module: str, x: Value) -> Value:
        """[B, T, hidden_size] -> [B, T, experts * 2 * inner]: of each expert up, then gate."""
        shape = (self.count * 2 * self.inner, self.config.hidden_size)
        if not self._is_fp8(module):
            weight = self.linear.input(f"{module}.weight", self.config.dtype, shape)
            return self._with_bias(module, self.linear.multiply(x, weight, shape, True))
        x = self.linear.rounded(module, x)
        scale = self.linear.input(f"{module}.weights_scaling_factor", "float32", shape[:1])
        weight = self.linear.input(f"{module}.weight", "float8_e4m3fn", shape)
        weight = self.ops.dequantize(weight, scale, self.config.dtype, axis=0)
        return self._with_bias(module, self.linear.multiply(x, weight, shape, True))

    def _with_bias(self, module: str, x: Value, dtype: str | None = None) -> Value:
        """x [B, T, features] and, where the module has one, its bias, that of all experts in turn;
        dtype: the model's unless given.
        """
        name, ops = f"{module}.bias", self.ops
        if name not in self.linear.table:
            return x
        count = prod(self.linear.table[name].shape)
        bias = self.linear.input(name, dtype or self.config.dtype, (count,))
        return ops.elementwise("SUM", x, ops.reshape(bias, (1, 1, -1)))

    def _closed(self, module: str, x: Value, shares: Value) -> Value:
        """[B, T, experts, inner] -> [B, T, hidden_size], each expert's, biases too, by its share.

        FP8: the experts' scales differ along what is summed. x is rounded, then multiplied by its
        expert's scale over the largest; the largest is the weight's.
        """
        ops, dtype = self.ops, self.config.dtype
        shape = (self.config.hidden_size, self.count * self.inner)
        weight_dtype = "float8_e4m3fn" if self._is_fp8(module) else dtype
        weight = self.linear.input(f"{module}.weight", weight_dtype, shape)
        biases = self._biases(f"{module}.bias", shares)
        if self._is_fp8(module):
            x = self.linear.rounded(module, x)
            largest = self.linear.input(f"{module}.weights_scaling_factor", "float32", ())
            weight = ops.dequantize(weight, largest, dtype)
            scales = self.linear.input(f"{module}.expert_scales", "float32", (self.count,))
            scales = ops.reshape(scales, (1, 1, self.count, 1))
            shares = ops.elementwise("PROD", shares, scales)
        x = ops.elementwise("PROD", x, ops.cast(shares, dtype))
        given = self.linear.multiply(ops.reshape(x, (0, 0, shape[1])), weight, shape, True)
        return given if biases is None else ops.elementwise("SUM", given, biases)

    def _biases(self, name: str, shares: Value) -> Value | None:
        """[B, T, hidden_size]: the experts' biases by their shares; None where they have none."""
        if name not in self.linear.table:
            return None
        shape = self.linear.table[name].shape
        shares = self.ops.cast(self.ops.reshape(shares, (0, 0, -1)), self.config.dtype)
        biases = self.linear.input(name, self.config.dtype, shape)
        return self.linear.multiply(shares, biases, shape, False)

    def _is_fp8(self, module: str) -> bool:
        return self.linear.table[f"{module}.weight"].dtype == "float8_e4m3fn"

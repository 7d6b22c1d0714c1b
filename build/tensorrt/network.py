"""The decoder as a TensorRT network: one definition for every dense family and every form.

The whole decoder, or a part of it: the embedding, some layers, the head. Inputs, B sequences of T
tokens each, L positions looked at; a part has those that it needs:

    input_ids, position_ids   int32 [B, T]   right-padded; pads get positions of the engine too
    rotary_ids                int32 [B, T]   rows of the rotary tables (`RotaryInputs.rows`)
    write_indices             int32 [B]      the cache row of each sequence's first token
    last_token_ids            int32 [B, 1]   the token of each sequence that gives logits
    kv_positions              int32 [L]      0, 1, ..., L - 1
    past_key_N, past_value_N  [B, kv_heads, S, head_size]  caches, one pair a layer
    vocab_start               int32 [1]      tp > 1: the first token of the rank's embedding
    rotary.cos, ...           float32        `RotaryInputs.tables`
    transformer. ..., lm_head.weight         `bound_weights` of a rank file
    hidden_states             [B, T, hidden_size]  without embedding: of the part before

Outputs: `logits` float32 [B, vocab_size], whole on every rank, or without head
`next_hidden_states` [B, T, hidden_size], which is other memory than the input's; and
`present_key_N`, `present_value_N`, which are the caches' own memory. A part counts its layers from
0, in all names (`shift_layer`), so that one plan serves all parts that are alike.

A token looks at the positions up to its own: the mask is computed from positions, never from
lengths, so that rows beyond a sequence's end may hold anything finite. Every rank runs the same
network: what differs is fed, or is a constant.

Knows no compiler and no checkpoint file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.tensorrt.linear import InputSpec, Linears
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.traits import AttentionRule, traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.tensorrt.inputs import RotaryInputs, layer_of

# What the compiler has a fused attention for, in 16 bit: these head sizes, and as many query
# heads on a rank (seen with TensorRT-RTX 1.7.1; with fewer it refuses unless it may decompose).
_FUSED_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
_FUSED_HEADS = 4


class NetworkPart(NamedTuple):
    """num_layers layers from first_layer on, and whether embedding and head are in it."""

    first_layer: int
    num_layers: int
    embeds: bool
    heads: bool

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)

    def holds(self, name: str) -> bool:
        """Whether a tensor of a rank file belongs to this part."""
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers
        return self.embeds if name.startswith("transformer.vocab_embedding.") else self.heads


def whole_decoder(config: ModelConfig) -> NetworkPart:
    return NetworkPart(0, config.num_hidden_layers, True, True)


class DecoderNetwork:
    """One rank's decoder over `ops`, or a part of it, added as it is made.

    context: S, the rows of a cache; max_positions: what the rotary tables cover. constants: one
    rank's `bound_weights` and `RotaryInputs.tables`, where the plan is to hold them.
    weights: the inputs that those feed otherwise; fed: the names of those that a step feeds.
    """

    def __init__(
        self,
        ops: NetworkOps,
        config: ModelConfig,
        context: int,
        max_positions: int,
        part: NetworkPart | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.ops = ops
        self.config = config
        self.context = context
        self.traits = traits_of(config)
        self.dtype = config.dtype
        self.table = output_tensors(config, 0)
        tp = config.mapping.tp_size
        self.tp = tp
        self.heads = config.num_attention_heads // tp
        self.kv_heads = max(1, config.num_key_value_heads // tp)
        self.part = part = part or whole_decoder(config)
        algo = config.quantization.quant_algo
        self.linear = Linears(ops, self.table, self.dtype, algo, part.first_layer, constants)
        self.fed: list[str] = []
        self.caches: list[tuple[str, Value]] = []
        if part.num_layers:
            with ops.part("inputs"):
                self._add_inputs(max_positions)
        x = self._embed() if part.embeds else self._hidden_states()
        for layer in part.layers:
            with ops.part(f"layers.{layer}"):
                x = self._layer(layer, x)
        if part.heads:
            self._add_logits(x)
        else:
            ops.output(x, "next_hidden_states")
        for name, present in self.caches:
            ops.output(present, name)

    @property
    def weights(self) -> dict[str, InputSpec]:
        return self.linear.weights

    def _step_input(self, name: str, shape: tuple[int, ...], dtype: str = "int32") -> Value:
        self.fed.append(name)
        return self.ops.input(name, dtype, shape)

    def _hidden_states(self) -> Value:
        shape = (-1, -1, self.config.hidden_size)
        return self._step_input("hidden_states", shape, self.dtype)

    def _add_inputs(self, max_positions: int) -> None:
        """What layers need, and the masks and sizes that they share."""
        ops, layers = self.ops, self.part.layers
        self.positions, self.rotary_ids = (
            self._step_input(name, (-1, -1)) for name in ("position_ids", "rotary_ids")
        )
        self.write_indices = self._step_input("write_indices", (-1,))
        self.kv_positions = self._step_input("kv_positions", (-1,))
        used = {self._rotary_table(layer) for layer in layers}
        self.rotary = {
            name: self.linear.input(name, "float32", tuple(table.shape))
            for name, table in RotaryInputs(self.config, max_positions).tables.items()
            if name.partition(".")[0] in used
        }
        windows = dict.fromkeys(self.traits.rules[layer].window for layer in layers)
        self.masks = {window: self._mask(window) for window in windows}
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

    def _embed(self) -> Value:
        """The tokens' embeddings [B, T, hidden_size]; the ranks that lack a token add zeros."""
        ops, name = self.ops, "transformer.vocab_embedding.weight"
        with ops.part("vocab_embedding"):
            shape = self.table[name].shape
            table = self.linear.input(name, self.dtype, shape)
            ids = self._step_input("input_ids", (-1, -1))
            if self.tp == 1:
                x = ops.gather(table, ids, 0)
            else:
                start = ops.reshape(ops.input("vocab_start", "int32", (1,)), (1, 1))
                local = ops.elementwise("SUB", ids, start)
                inside = ops.elementwise("MAX", local, ops.number(0, 2, "int32"))
                inside = ops.elementwise("MIN", inside, ops.number(shape[0] - 1, 2, "int32"))
                mine = ops.cast(ops.elementwise("EQUAL", inside, local), self.dtype)
                x = ops.gather(table, inside, 0)
                x = ops.elementwise("PROD", x, ops.reshape(mine, (0, 0, 1)))
                x = ops.all_reduce(x, self.tp)
            if self.traits.embedding_scale != 1.0:
                scale = ops.cast(ops.number(self.traits.embedding_scale, 3), self.dtype)
                x = ops.elementwise("PROD", x, scale)
        return x

    def _norm(self, module: str, x: Value, rank: int = 3) -> Value:
        """RMS norm over the last axis, in float32."""
        ops = self.ops
        with ops.part(module.rpartition(".")[2]):
            wide = ops.cast(x, "float32")
            mean = ops.reduce("AVG", ops.elementwise("PROD", wide, wide), rank - 1)
            mean = ops.elementwise("SUM", mean, ops.number(self.config.norm_epsilon, rank))
            wide = ops.elementwise("DIV", wide, ops.unary("SQRT", mean))
            weight = self.linear.vector(f"{module}.weight", rank, "float32")
            return ops.cast(ops.elementwise("PROD", wide, weight), self.dtype)

    def _layer(self, layer: int, x: Value) -> Value:
        name = f"transformer.layers.{layer}"
        attended = self._attend(layer, self._norm(f"{name}.input_layernorm", x))
        if not self.traits.norm_sublayers:
            x = self.ops.elementwise("SUM", x, attended)
            fed = self._feed_forward(name, self._norm(f"{name}.post_layernorm", x))
            return self.ops.elementwise("SUM", x, fed)
        x = self.ops.elementwise("SUM", x, self._norm(f"{name}.post_layernorm", attended))
        fed = self._feed_forward(name, self._norm(f"{name}.pre_feedforward_layernorm", x))
        return self.ops.elementwise("SUM", x, self._norm(f"{name}.post_feedforward_layernorm", fed))

    def _attend(self, layer: int, x: Value) -> Value:
        """[B, T, hidden_size] -> the same shape, summed over the ranks."""
        ops, size = self.ops, self.config.head_size
        name = f"transformer.layers.{layer}.attention"
        rule = self.traits.rules[layer]
        count = self.heads + 2 * self.kv_heads
        qkv = ops.reshape(self.linear(f"{name}.qkv", x), (0, 0, count, size), after=(0, 2, 1, 3))
        q = ops.slice(qkv, (0, 0, 0, 0), self.query_sizes)  # [B, heads, T, D]
        k = ops.slice(qkv, (0, self.heads, 0, 0), self.key_sizes)
        v = ops.slice(qkv, (0, self.heads + self.kv_heads, 0, 0), self.key_sizes)
        if f"{name}.q_layernorm.weight" in self.table:
            q = self._norm(f"{name}.q_layernorm", q, 4)
            k = self._norm(f"{name}.k_layernorm", k, 4)
        scale = 1.0 if rule.soft_cap is not None else rule.scale
        q, k = self._rotate(layer, q, scale), self._rotate(layer, k, 1.0)
        k, v = self._cached("key", layer, k), self._cached("value", layer, v)
        mask = self.masks[rule.window]
        if rule.soft_cap is None:
            out = ops.attention(q, k, v, mask, self._fused())
        else:
            out = self._capped(q, k, v, mask, rule)
        out = ops.reshape(out, (0, 0, self.heads * size), before=(0, 2, 1, 3))
        return self._summed(self.linear(f"{name}.dense", out))

    def _fused(self) -> bool:
        """Whether attention must become one kernel, or may be single products."""
        known = self.config.head_size in _FUSED_HEAD_SIZES and self.heads >= _FUSED_HEADS
        return known and self.dtype != "float32"

    def _rotary_table(self, layer: int) -> str:
        return "rotary_local" if self.traits.ropes[layer] else "rotary"

    def _rotate(self, layer: int, x: Value, scale: float) -> Value:
        """x [B, heads, T, D] turned by its positions and scaled, both in float32."""
        ops = self.ops
        table = self._rotary_table(layer)
        cos, sin = self.rotary[f"{table}.cos"], self.rotary[f"{table}.sin"]
        wide = ops.cast(x, "float32")
        wide = ops.rotary(wide, cos, sin, self.rotary_ids, self.config.rotary_dim)
        if scale != 1.0:
            wide = ops.elementwise("PROD", wide, ops.number(scale, 4))
        return ops.cast(wide, self.dtype)

    def _cached(self, side: str, layer: int, update: Value) -> Value:
        """This step's keys or values behind the earlier ones: the cache's first L rows."""
        shape = (-1, self.kv_heads, self.context, self.config.head_size)
        local = layer - self.part.first_layer
        cache = self._step_input(f"past_{side}_{local}", shape, self.dtype)
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
        weights = ops.cast(ops.softmax(scores, 4), self.dtype)
        return ops.reshape(ops.matmul(weights, v), (0, self.heads, -1, size))

    def _feed_forward(self, name: str, x: Value) -> Value:
        ops = self.ops
        if self.config.gate_in_fc:
            inner = self.table[f"{name}.mlp.proj.weight"].shape[-1]
            both = ops.reshape(self.linear(f"{name}.mlp.fc", x), (0, 0, 2, inner))
            up, gate = (ops.gather(both, ops.constant(i, "int32"), 2) for i in (0, 1))
        else:
            gate, up = self.linear(f"{name}.mlp.fc", x), self.linear(f"{name}.mlp.gate", x)
        if self.traits.activation == "gelu":
            gate = ops.activation("GELU_TANH", gate)
        else:
            gate = ops.elementwise("PROD", gate, ops.activation("SIGMOID", gate))
        product = ops.elementwise("PROD", gate, up)
        return self._summed(self.linear(f"{name}.mlp.proj", product))

    def _summed(self, x: Value) -> Value:
        """A product over inputs that are cut: the ranks' parts added up."""
        return x if self.tp == 1 else self.ops.all_reduce(x, self.tp)

    def _add_logits(self, x: Value) -> None:
        """float32 logits of one token of each sequence, gathered over the ranks' vocabularies."""
        ops, vocab = self.ops, self.config.vocab_size
        with ops.part("lm_head"):
            last = self._step_input("last_token_ids", (-1, 1))
            x = ops.gather(x, last, 1, batch_axes=1)  # [B, 1, hidden_size]
            x = self.linear("lm_head", self._norm("transformer.ln_f", x))
            rows = self.table["lm_head.weight"].shape[0]
            logits = ops.reshape(ops.cast(x, "float32"), (0, rows))
            if self.tp > 1:
                logits = ops.all_gather(ops.transpose(logits, (1, 0)), self.tp)
                logits = ops.transpose(logits, (1, 0))
            if rows * self.tp != vocab:  # rows of zeros, which make the cuts equal
                sizes = ops.elementwise("PROD", ops.shape(last), ops.constant([1, vocab], "int64"))
                logits = ops.slice(logits, (0, 0), sizes)
            cap = self.traits.logits_soft_cap
            if cap is not None:
                logits = ops.elementwise("DIV", logits, ops.number(cap, 2))
                logits = ops.activation("TANH", logits)
                logits = ops.elementwise("PROD", logits, ops.number(cap, 2))
            ops.output(logits, "logits")

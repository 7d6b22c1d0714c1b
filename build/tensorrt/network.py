"""The decoder as a TensorRT network: one definition for every family and every form.

The whole decoder, or a part of it: the embedding, some layers, the head. Inputs, B sequences of T
tokens each, L positions looked at; a part has those that it needs:

    input_ids, position_ids   int32 [B, T]   right-padded; pads get positions of the engine too
    rotary_ids                int32 [B, T]   rows of the rotary tables (`RotaryInputs.rows`), where
                                             a layer has rope
    write_indices             int32 [B]      the cache row of each sequence's first token
    last_token_ids            int32 [B, 1]   the token of each sequence that gives logits
    kv_positions              int32 [L]      0, 1, ..., L - 1
    past_key_N, past_value_N  [B, kv_heads, S, head_size]  caches, a pair a layer that attends
    past_key_N                [B, 1, S, rank + rope]  alone, where attention is latent
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
from enginehouse.build.tensorrt.attention import Attention
from enginehouse.build.tensorrt.attention_inputs import AttentionInputs
from enginehouse.build.tensorrt.experts import Experts
from enginehouse.build.tensorrt.feed_forward import FeedForward
from enginehouse.build.tensorrt.latent_attention import LatentAttention
from enginehouse.build.tensorrt.linear import InputSpec, Linears
from enginehouse.build.tensorrt.norms import Norms
from enginehouse.build.tensorrt.ops import NetworkOps, StepInputs, Value
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt.inputs import layer_of


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
    weights: the inputs that those feed otherwise; fed: the names and
    shapes of those that a step feeds.
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
        self.traits = traits_of(config)
        self.dtype = config.dtype
        self.table = output_tensors(config, 0)
        self.tp = config.mapping.tp_size
        self.part = part = part or whole_decoder(config)
        algo = config.quantization.quant_algo
        self.linear = Linears(ops, self.table, self.dtype, algo, part.first_layer, constants)
        self.norm = Norms(ops, self.linear, config)
        self.step_input = StepInputs(ops)
        caches: list[tuple[str, Value]] = []
        if attending := [layer for layer in part.layers if config.has_attention(layer)]:
            sizes = context, max_positions
            shared = AttentionInputs(ops, self.linear, self.step_input, config, *sizes, attending)
            kind = Attention if config.latent is None else LatentAttention
            self.attention = kind(ops, self.linear, self.norm, shared, config)
            caches = shared.caches
        if part.num_layers:
            self.plain = FeedForward(ops, self.linear, config)
            if config.num_experts:
                self.experts = Experts(ops, self.linear, self.plain, config)
        entering = x = self._embed() if part.embeds else self._hidden_states()
        for layer in part.layers:
            with ops.part(f"layers.{layer}"):
                x = self._layer(layer, x)
        if part.heads:
            self._add_logits(x)
        else:  # of layers that lack everything a copy, as an input is no output
            ops.output(ops.cast(x, self.dtype) if x is entering else x, "next_hidden_states")
        for name, present in caches:
            ops.output(present, name)
        unread = {name for name in self.table if part.holds(name)} - self.linear.asked
        if unread:
            raise EngineError(
                f"backend=tensorrt reads no {min(unread)}, which {config.architecture} has; choose "
                "backend=torch"
            )

    @property
    def weights(self) -> dict[str, InputSpec]:
        return self.linear.weights

    @property
    def fed(self) -> dict[str, tuple[int, ...]]:
        return self.step_input.shapes

    def _hidden_states(self) -> Value:
        shape = (-1, -1, self.config.hidden_size)
        return self.step_input("hidden_states", shape, self.dtype)

    def _embed(self) -> Value:
        """The tokens' embeddings [B, T, hidden_size]; the ranks that lack a token add zeros."""
        ops, name = self.ops, "transformer.vocab_embedding.weight"
        with ops.part("vocab_embedding"):
            shape = self.table[name].shape
            table = self.linear.input(name, self.dtype, shape)
            ids = self.step_input("input_ids", (-1, -1))
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

    def _layer(self, layer: int, x: Value) -> Value:
        name = f"transformer.layers.{layer}"
        if self.traits.parallel:
            return self._parallel(layer, name, x)
        if self.config.has_attention(layer):
            x = self._attend(layer, name, x)
        return self._feed(name, x) if self.config.has_mlp(layer) else x

    def _parallel(self, layer: int, name: str, x: Value) -> Value:
        """Attention and MLP beside each other; the ranks' parts of both are exchanged as one."""
        entering = self._entering(f"{name}.input_layernorm", x)
        attended = self.attention(layer, entering)
        if self.traits.parallel_norm:
            entering = self.norm(f"{name}.post_layernorm", x)
        fed = self._mlp(name, entering)
        return self._add(x, self._summed(self.ops.elementwise("SUM", attended, fed)))

    def _attend(self, layer: int, name: str, x: Value) -> Value:
        attended = self.attention(layer, self._entering(f"{name}.input_layernorm", x))
        attended = self._summed(attended)
        if self.traits.norm_sublayers:
            attended = self.norm(f"{name}.post_layernorm", attended)
        return self._add(x, attended)

    def _feed(self, name: str, x: Value) -> Value:
        if not self.traits.norm_sublayers:
            entering = self.norm(f"{name}.post_layernorm", x)
            return self._add(x, self._summed(self._mlp(name, entering)))
        fed = self._mlp(name, self._entering(f"{name}.pre_feedforward_layernorm", x))
        fed = self.norm(f"{name}.post_feedforward_layernorm", self._summed(fed))
        return self._add(x, fed)

    def _entering(self, module: str, x: Value) -> Value:
        return self.norm(module, x) if self.traits.norm_inputs else x

    def _mlp(self, name: str, x: Value) -> Value:
        mixed = f"{name}.mlp.router.weight" in self.table
        return (self.experts if mixed else self.plain)(f"{name}.mlp", x)

    def _add(self, x: Value, given: Value) -> Value:
        """x with what a sublayer gives, which is scaled in float32 where a model does that."""
        ops, scale = self.ops, self.traits.residual_scale
        if scale != 1.0:
            given = ops.elementwise("PROD", ops.cast(given, "float32"), ops.number(scale, 3))
            given = ops.cast(given, self.dtype)
        return ops.elementwise("SUM", x, given)

    def _summed(self, x: Value) -> Value:
        """A product over inputs that are cut: the ranks' parts added up."""
        return x if self.tp == 1 else self.ops.all_reduce(x, self.tp)

    def _add_logits(self, x: Value) -> None:
        """float32 logits of one token of each sequence, gathered over the ranks' vocabularies."""
        ops, vocab = self.ops, self.config.vocab_size
        with ops.part("lm_head"):
            last = self.step_input("last_token_ids", (-1, 1))
            x = ops.gather(x, last, 1, batch_axes=1)  # [B, 1, hidden_size]
            x = self.linear("lm_head", self.norm("transformer.ln_f", x))
            rows = self.table["lm_head.weight"].shape[0]
            logits = ops.reshape(ops.cast(x, "float32"), (0, rows))
            if self.tp > 1:
                logits = ops.all_gather(ops.transpose(logits, (1, 0)), self.tp)
                logits = ops.transpose(logits, (1, 0))
            if rows * self.tp != vocab:  # rows of zeros, which make the cuts equal
                sizes = ops.elementwise("PROD", ops.shape(last), ops.constant([1, vocab], "int64"))
                logits = ops.slice(logits, (0, 0), sizes)
            scale, cap = self.traits.logits_scale, self.traits.logits_soft_cap
            if scale != 1.0:
                logits = ops.elementwise("PROD", logits, ops.number(scale, 2))
            if cap is not None:
                logits = ops.elementwise("DIV", logits, ops.number(cap, 2))
                logits = ops.activation("TANH", logits)
                logits = ops.elementwise("PROD", logits, ops.number(cap, 2))
            ops.output(logits, "logits")

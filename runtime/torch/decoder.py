"""The torch decoder: token ids in, logits out, over whatever attention it is given.

It knows layers and weights. It knows no request, no block and no queue: keys and values go to
an `Attention` object, which is where they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.carried import carried
from enginehouse.runtime.checkpoint.rope import Angles, Rotary
from enginehouse.runtime.checkpoint.traits import AttentionRule, traits_of
from enginehouse.runtime.checkpoint.weights import module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.around import Around
from enginehouse.runtime.torch.attention import attend, soft_cap, visible
from enginehouse.runtime.torch.entry import Entry, Exit, LayerInputs
from enginehouse.runtime.torch.linear import DenseLinear, Linear, make_linear
from enginehouse.runtime.torch.linear_attention import DeltaRule, LinearAttention, Past
from enginehouse.runtime.torch.mlp import PlainMlp
from enginehouse.runtime.torch.moe import ExpertMlp
from enginehouse.runtime.torch.self_attention import HeadAttention, LatentAttention
from enginehouse.runtime.torch.streams import LayerStreams

Tensors = Mapping[str, Tensor]
Observer = Callable[[str, Tensor], None]
Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionRule], Tensor]

PREFIX = "transformer.layers.{}."


class Attention(Protocol):
    """What goes from token to token."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Attends over this step's and all earlier keys of each sequence.

        q: [tokens, heads, head_size]; k, v: [tokens, kv_heads, head_size], rotated already.
        Returns [tokens, heads * head_size].
        """

    def recur(
        self, layer: int, rule: DeltaRule, mixed: Tensor, decay: Tensor, rate: Tensor
    ) -> Tensor:
        """What tokens read out of their sequence's state, which goes on: as DeltaRule's, of this
        step's tokens, [tokens, ...].
        """


class CausalAttention:
    """One whole sequence and nothing cached: for calibration and for checks; satisfies Attention.

    attend: in the place of attention over keys.
    """

    def __init__(self, attend: Attend | None = None) -> None:
        self.attend = attend or _attend_causally

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        return self.attend(layer, q, k, v, rule)

    def recur(
        self, layer: int, rule: DeltaRule, mixed: Tensor, decay: Tensor, rate: Tensor
    ) -> Tensor:
        past = Past.none(rule.delta, 1, mixed.dtype, mixed.device)
        return rule(mixed[None], decay[None], rate[None], past)[0][0]


def _attend_causally(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    tokens = torch.arange(len(q), device=q.device)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, tokens, D]
    return attend(q, k, v, visible(tokens, tokens, rule.window), rule).transpose(0, 1).flatten(1)


causal_attention = CausalAttention()


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, config: ModelConfig) -> Tensor:
    """By RMS, or by LayerNorm where a model has that, over the last dimension; None: not scaled."""
    if config.layer_norm:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, config.norm_epsilon)
    return functional.rms_norm(x, x.shape[-1:], weight, config.norm_epsilon)


class DecoderLayer:
    """One transformer block.

    tensors: the layer's checkpoint tensors merged over ranks, without their layer prefix.
    `observe`, when set, is shown the input of every linear module: calibration hangs there.
    `watch`, when set, is shown all else that a GPU holds in the model's dtype: what linears give,
    the turned queries and keys, and the sums that go from layer to layer.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors, dtype: torch.dtype) -> None:
        self.config = config
        self.traits = traits_of(config)
        self.attention: HeadAttention | LatentAttention | LinearAttention | None = None
        if "linear_attention.dense.weight" in tensors:
            self.attention = LinearAttention(config, tensors, dtype)
        elif "attention.dense.weight" in tensors:
            kind = HeadAttention if config.latent is None else LatentAttention
            self.attention = kind(config, tensors, dtype)
        self.carried = carried(config)
        several = config.num_streams > 1
        self.streams = LayerStreams(config, tensors, dtype) if several else None
        self.residual: dict[str, Linear] | None = None
        if self.traits.learned_residual:
            names = ("laurel_left", "laurel_right")
            self.residual = {n: make_linear([module_tensors(tensors, n)], dtype) for n in names}
        self.inputs = LayerInputs(config, tensors, dtype) if config.per_layer_size else None
        multiplier = tensors.get("layer.layer_scalar")
        self.multiplier = None if multiplier is None else multiplier.to(dtype)
        self.mlp: PlainMlp | ExpertMlp | None = None
        if mlp := module_tensors(tensors, "mlp"):
            is_mixture = "router.weight" in mlp
            self.mlp = (ExpertMlp if is_mixture else PlainMlp)(config, mlp, dtype)
        self.norms = {
            name.removesuffix("layernorm.weight"): tensor.to(dtype)
            for name, tensor in tensors.items()
            if name.endswith("layernorm.weight")
        }
        self.norm_biases = {
            name.removesuffix("layernorm.bias"): tensor.to(dtype)
            for name, tensor in tensors.items()
            if name.endswith("layernorm.bias")
        }
        self.observe: Observer | None = None
        self.watch: Observer | None = None

    def __call__(self, index: int, rows: Tensor, angles: Angles, attention: Attention) -> Tensor:
        """rows: [tokens, hidden_size] -> the same shape, one layer later; of some models with more
        behind the hidden states (`checkpoint/carried.py`).
        """
        return self.feed_forward(index, rows, self.attend(index, rows, angles, attention))

    def attend(self, index: int, rows: Tensor, angles: Angles, attention: Attention) -> Tensor:
        """The layer's first half: rows with what attention adds to them."""
        if self.streams is not None:
            rows = self._replaced(rows, self.streams.predicted(self._streams_of(rows)))
        hidden = rows[:, : self.config.hidden_size]
        if self.attention is None:
            return self._with(rows, self._shown("sum behind attention", hidden))
        source = self.config.kv_layer(index)
        begin, end = self.carried.kept.get(source, (0, 0))

        def attend(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
            nonlocal rows
            if end and source == index:
                kv = (k.flatten(1), v.flatten(1))
                rows = torch.cat([rows[:, :begin], *kv, rows[:, end:]], dim=1)
            return attention(source, q, k, v, rule)

        def recur(rule: DeltaRule, mixed: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
            return attention.recur(index, rule, mixed, decay, rate)

        entering, rule = self._entering(hidden, "input_"), self.traits.rules[index]
        kept = rows[:, begin:end]
        around = Around(attend, recur, self._run, self._norm, self._shown, kept)
        attended = self.attention(entering, rule, angles, around)
        attended = self._norm(attended, "post_") if self.traits.norm_sublayers else attended
        summed = self._sum(hidden, attended)
        if self.residual is not None:
            summed = (summed + self._learned(self.residual, entering)) * 2**-0.5
        return self._with(rows, self._shown("sum behind attention", summed))

    def feed_forward(self, index: int, rows: Tensor, middle: Tensor) -> Tensor:
        """The second half: what the first gave, middle, with what the MLP adds to it. rows: what
        entered the first, and enters a parallel MLP too.
        """
        size = self.config.hidden_size
        given = self._fed(index, rows[:, :size], middle[:, :size])
        if self.streams is not None:
            given = self._shown("sum behind the MLP", given)
            return self._with_streams(self.streams, index, rows, middle, given)
        if self.inputs is not None:
            own = self.inputs(given, middle[:, self.carried.inputs_of(index)], self._run)
            given = given + self._norm(own, "per_layer_")
        if self.multiplier is not None:
            given = given * self.multiplier
        return self._with(middle, self._shown("sum behind the MLP", given))

    def _with_streams(
        self, streams: LayerStreams, index: int, rows: Tensor, middle: Tensor, given: Tensor
    ) -> Tensor:
        """All streams corrected by what the first became; a layer's own inputs go to the others."""
        corrected = streams.corrected(streams.predicted(self._streams_of(rows)), given)
        if self.inputs is not None:
            scaled = corrected[:, 0] * streams.scale
            own = self.inputs(scaled, middle[:, self.carried.inputs_of(index)], self._run)
            own = self._norm(own, "per_layer_").unsqueeze(1)
            corrected = torch.cat([corrected[:, :1], corrected[:, 1:] + own], dim=1)
        return self._replaced(middle, corrected)

    def _streams_of(self, rows: Tensor) -> Tensor:
        """[tokens, streams, hidden_size]"""
        streams: Tensor = rows[:, : self.carried.hidden].unflatten(1, (self.config.num_streams, -1))
        return streams

    def _replaced(self, rows: Tensor, streams: Tensor) -> Tensor:
        """The rows with other streams."""
        return torch.cat([streams.flatten(1), rows[:, self.carried.hidden :]], dim=1)

    def _learned(self, linears: Mapping[str, Linear], entering: Tensor) -> Tensor:
        """What a residual of low rank makes of what enters attention (LAuReL)."""
        x = entering
        for name, linear in linears.items():
            x = self._run(name, linear, x)
        return entering + self._norm(x, "laurel_")

    def _with(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """The rows with other hidden states."""
        if rows.shape[1] == hidden.shape[1]:
            return hidden
        return torch.cat([hidden, rows[:, self.config.hidden_size :]], dim=1)

    def _fed(self, index: int, hidden: Tensor, middle: Tensor) -> Tensor:
        """Hidden states alone: what the MLP adds to them."""
        if self.mlp is None:
            return middle
        if self.traits.norm_experts:
            fed = self._norm(self._mixed(middle), "post_feedforward_")
        elif self.traits.norm_sublayers:
            fed = self._feed(index, self.mlp, self._entering(middle, "pre_feedforward_"))
            fed = self._norm(fed, "post_feedforward_")
        elif self.traits.parallel:
            name = "post_" if self.traits.parallel_norm else "input_"
            fed = self.mlp(self._norm(hidden, name), self._run)
        else:
            fed = self.mlp(self._norm(middle, "post_"), self._run)
        return self._sum(middle, fed)

    def _feed(self, index: int, mlp: PlainMlp | ExpertMlp, x: Tensor) -> Tensor:
        cutoff = self.traits.cutoffs[index] if self.traits.cutoffs else None
        if cutoff is None:
            return mlp(x, self._run)
        assert isinstance(mlp, PlainMlp)
        return mlp(x, self._run, cutoff)

    def _mixed(self, middle: Tensor) -> Tensor:
        """The expert that every token sees and the others, each between norms of its own."""
        mlp = self.mlp
        assert isinstance(mlp, ExpertMlp) and mlp.shared is not None
        shared = mlp.shared(self._norm(middle, "pre_feedforward_"), self._run)
        judged = normed(middle, None, None, self.config)
        chosen = mlp.routed(self._norm(middle, "pre_experts_"), judged, self._run)
        return self._norm(shared, "post_shared_") + self._norm(chosen, "post_experts_")

    def _entering(self, hidden: Tensor, name: str) -> Tensor:
        return self._norm(hidden, name) if self.traits.norm_inputs else hidden

    def _sum(self, hidden: Tensor, given: Tensor) -> Tensor:
        scale = self.traits.residual_scale
        return hidden + (given if scale == 1.0 else given * scale)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return normed(x, self.norms.get(name), self.norm_biases.get(name), self.config)

    def _run(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(name, x)
        y = linear(x)
        if self.watch is not None:
            self.watch(f"{name}'s output", y)
        return y

    def _shown(self, place: str, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(place, x)
        return x


class Decoder:
    """The whole model: embedding, layers, last norm, lm_head.

    `stored(prefix)` returns the merged checkpoint tensors below a prefix, without it; it is
    asked for one layer at a time, so that only one layer is ever held twice. They are moved to
    the device before anything is made of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        stored: Callable[[str], Tensors],
        dtype: torch.dtype,
        max_positions: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        def tensors(prefix: str) -> Tensors:
            return {name: tensor.to(device) for name, tensor in stored(prefix).items()}

        self.config = config
        self.traits = traits_of(config)
        self.dtype = dtype
        self.entry = Entry(config, tensors, dtype)
        self.embedding, self.exit = self.entry.embedding, Exit(config, tensors, dtype)
        self.layers = [
            DecoderLayer(config, tensors(PREFIX.format(i)), dtype)
            for i in range(config.num_hidden_layers)
        ]
        last_norm = tensors("transformer.ln_f.") if self.traits.norm_weights else {}
        self.final_norm = {name: tensor.to(dtype) for name, tensor in last_norm.items()}
        last = tensors("lm_head.")
        head, bias = last["weight"].to(dtype), last.get("bias")
        if config.tie_word_embeddings and torch.equal(head, self.embedding):
            head = self.embedding  # one copy in memory
        self.lm_head = DenseLinear(head, None if bias is None else bias.to(dtype), dtype)
        self.rotary = Rotary(config, max_positions or config.max_position_embeddings).to(device)
        self.watch: Observer | None = None  # is shown what the head reads and gives

    @torch.inference_mode()
    def hidden_states(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        contexts: Tensor | None = None,
    ) -> Tensor:
        """[tokens] int64 ids and positions -> [tokens, hidden_size] before the last norm.

        contexts: what `Rotary.at` wants of tokens that are not one sequence from its start.
        """
        hidden = self.entry(token_ids)
        angles, unturned = self.rotary.at(positions, contexts), self.rotary.unturned(positions)
        for index, layer in enumerate(self.layers):
            rope = self.traits.ropes[index]
            hidden = layer(index, hidden, unturned if rope is None else angles[rope], attention)
        return self.exit(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """Behind the last norm: [rows, hidden_size], as it came."""
        weight, bias = self.final_norm.get("weight"), self.final_norm.get("bias")
        return normed(hidden, weight, bias, self.config)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> float32 [rows, vocab_size]."""
        normed = self.normed(hidden)
        logits = self.lm_head(normed)
        if self.watch is not None:
            self.watch("lm_head's input", normed)
            self.watch("lm_head's output", logits)
        scaled = logits.float() * self.traits.logits_scale
        return soft_cap(scaled, self.traits.logits_soft_cap)

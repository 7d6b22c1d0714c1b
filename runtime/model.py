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

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.linear import DenseLinear, Linear, make_linear
from enginehouse.runtime.rope import RotaryTable, rotate

Tensors = Mapping[str, Tensor]
Observer = Callable[[str, Tensor], None]

PREFIX = "transformer.layers.{}."


class Attention(Protocol):
    """Attends over this step's and all earlier keys of each sequence.

    q: [tokens, heads, head_size]; k, v: [tokens, kv_heads, head_size], rotated already.
    Returns [tokens, heads * head_size].
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One whole sequence and nothing cached: for calibration and for checks."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, D]
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1).flatten(1)


def _module(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """The tensors of one module: {"weight": ..., "weights_scaling_factor": ...}."""
    prefix = name + "."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


class DecoderLayer:
    """One transformer block.

    tensors: the layer's checkpoint tensors merged over ranks, without their layer prefix.
    `observe`, when set, is shown the input of every linear module: calibration hangs there.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors, dtype: torch.dtype) -> None:
        self.config = config
        self.qkv = make_linear([_module(tensors, "attention.qkv")], dtype)
        self.dense = make_linear([_module(tensors, "attention.dense")], dtype)
        fc, gate = _module(tensors, "mlp.fc"), _module(tensors, "mlp.gate")
        self.fc_gate = make_linear([fc, gate], dtype)
        self.proj = make_linear([_module(tensors, "mlp.proj")], dtype)
        self.input_norm = tensors["input_layernorm.weight"].to(dtype)
        self.post_norm = tensors["post_layernorm.weight"].to(dtype)
        self.observe: Observer | None = None

    def __call__(
        self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        """hidden: [tokens, hidden_size] -> the same shape, one layer later."""
        hidden = hidden + self._attend(
            index, self._norm(hidden, self.input_norm), cos, sin, attention
        )
        return hidden + self._feed_forward(self._norm(hidden, self.post_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.norm_epsilon)

    def _run(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(name, x)
        return linear(x)

    def _attend(
        self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        c = self.config
        qkv = self._run("attention.qkv", self.qkv, x)
        heads = qkv.view(len(x), -1, c.head_size)  # [tokens, heads + 2 * kv_heads, D]
        rotated = c.num_attention_heads + c.num_key_value_heads
        qk = rotate(heads[:, :rotated], cos, sin)
        q, k = qk.split([c.num_attention_heads, c.num_key_value_heads], dim=1)
        out = attention(index, q, k, heads[:, rotated:])
        return self._run("attention.dense", self.dense, out)

    def _feed_forward(self, x: Tensor) -> Tensor:
        up = self._run("mlp.fc", self.fc_gate, x)
        half = up.shape[-1] // 2
        product = functional.silu(up[:, :half]) * up[:, half:]
        return self._run("mlp.proj", self.proj, product)


class Decoder:
    """The whole model: embedding, layers, last norm, lm_head.

    `tensors(prefix)` returns the merged checkpoint tensors below a prefix, without it; it is
    asked for one layer at a time, so that only one layer is ever held twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Callable[[str], Tensors],
        dtype: torch.dtype,
        max_positions: int | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding = tensors("transformer.vocab_embedding.")["weight"].to(dtype)
        self.layers = [
            DecoderLayer(config, tensors(PREFIX.format(i)), dtype)
            for i in range(config.num_hidden_layers)
        ]
        self.final_norm = tensors("transformer.ln_f.")["weight"].to(dtype)
        head = tensors("lm_head.")["weight"].to(dtype)
        if config.tie_word_embeddings and torch.equal(head, self.embedding):
            head = self.embedding  # one copy in memory
        self.lm_head = DenseLinear(head, None, dtype)
        self.rotary = RotaryTable(config, max_positions or config.max_position_embeddings)

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """[tokens] int64 ids and positions -> [tokens, hidden_size] before the last norm."""
        hidden = self.embedding[token_ids]
        cos, sin = self.rotary.at(positions)
        for index, layer in enumerate(self.layers):
            hidden = layer(index, hidden, cos, sin, attention)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> float32 [rows, vocab_size]."""
        normed = functional.rms_norm(
            hidden, (hidden.shape[-1],), self.final_norm, self.config.norm_epsilon
        )
        return self.lm_head(normed).float()

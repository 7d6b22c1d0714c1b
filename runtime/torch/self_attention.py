"""What stands around a layer's attention: its projections, norms and rotation, by heads of their
own or through latents.

Source: DeepSeek-V2 (2024), section 2.1 and appendix C, for latent attention in the form in which
keys and values stay as they were compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.rope import Angles, rotate
from enginehouse.runtime.checkpoint.traits import AttentionRule, traits_of
from enginehouse.runtime.checkpoint.weights import module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.around import Around
from enginehouse.runtime.torch.linear import Linear, make_linear
from enginehouse.runtime.torch.mlp import Run

QUERIES, KEYS = "attention queries", "attention keys"  # what `watch` knows them by
_LATENT_EPSILON = 1e-6  # transformers' classes have it written in


class HeadAttention:
    """tensors: the layer's, whole, without its prefix. linears: by their names."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.config = config
        self.traits = traits_of(config)
        self.has_keys = "attention.qkv.weight" in tensors
        self.first = "attention.qkv" if self.has_keys else "attention.q"
        names = (self.first, "attention.dense")
        self.linears = {n: make_linear([module_tensors(tensors, n)], dtype) for n in names}
        # layers may differ in it, and in the number of KV heads
        self.head_size = tensors["attention.dense.weight"].shape[1] // config.num_attention_heads
        self.has_norms = "attention.q_layernorm.weight" in tensors
        sinks = tensors.get("attention.sinks")
        self.sinks = None if sinks is None else sinks.to(dtype)

    def __call__(self, x: Tensor, rule: AttentionRule, angles: Angles, around: Around) -> Tensor:
        """x: [tokens, hidden_size], normed -> the same shape."""
        c, traits, show = self.config, self.traits, around.show
        qkv = around.run(self.first, self.linears[self.first], x)
        if traits.clip_qkv is not None:
            qkv = qkv.clamp(-traits.clip_qkv, traits.clip_qkv)
        qkv, gates = self._without_gates(qkv)
        heads = qkv.view(len(x), -1, self.head_size)  # [tokens, heads + 2 * kv_heads, D]
        kv_heads = (heads.shape[1] - c.num_attention_heads) // 2
        sizes = [c.num_attention_heads, kv_heads]
        qk, v = heads.split([sum(sizes), kv_heads], dim=1)
        if self.has_norms and not traits.norm_turned_heads:
            qk = self._norm_heads(qk, sizes, around.norm)
        qk = rotate(qk, angles, traits.rope_interleaved)
        if traits.l2_norm_heads and angles.cos is not None:
            qk = functional.rms_norm(qk, qk.shape[-1:], None, c.norm_epsilon)
        if self.has_norms and traits.norm_turned_heads:
            qk = self._norm_heads(qk, sizes, around.norm)
        if traits.norm_values:
            v = functional.rms_norm(v, v.shape[-1:], None, c.norm_epsilon)
        q, k = qk.split(sizes, dim=1)
        if not self.has_keys:
            assert around.kept is not None
            k, v = around.kept.unflatten(1, (2, -1, self.head_size)).unbind(1)
        if angles.query_scale is not None:
            q = q * angles.query_scale.to(q.dtype)
        out = around.attend(show(QUERIES, q), show(KEYS, k), v, rule._replace(sinks=self.sinks))
        out = out if gates is None else out * gates.sigmoid()
        return around.run("attention.dense", self.linears["attention.dense"], out)

    def _without_gates(self, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        """q, k and v, and the gates of what is attended to, [tokens, heads * head_size], which
        stand behind the queries of each head.
        """
        c = self.config
        if not self.traits.gated_attention:
            return qkv, None
        queries, keys = qkv.split([c.num_attention_heads * c.query_size, c.kv_size], dim=1)
        queries, gates = queries.view(len(qkv), -1, 2, c.head_size).unbind(2)
        return torch.cat([queries.flatten(1), keys], dim=1), gates.flatten(1)

    def _norm_heads(
        self, qk: Tensor, sizes: list[int], norm: Callable[[Tensor, str], Tensor]
    ) -> Tensor:
        """qk: [tokens, heads + kv_heads, head_size]"""
        names = ("attention.q_", "attention.k_")
        if not self.has_keys:
            return norm(qk, names[0])
        pairs = zip(qk.split(sizes, dim=1), names, strict=True)
        if not self.traits.norm_all_heads:
            return torch.cat([norm(x, name) for x, name in pairs], dim=1)
        return torch.cat([norm(x.flatten(1), name).view_as(x) for x, name in pairs], dim=1)


class LatentAttention:
    """Queries go to the latents of keys and values, which are kept as one head's: of rank elements,
    and behind them those that rope turns.

    kv_b makes keys [heads, nope, rank] and values [heads, value, rank] of latents: the first is
    multiplied into the queries, the second into what attention gives.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        latent = config.latent
        assert latent is not None
        self.latent, self.heads = latent, config.num_attention_heads
        self.interleaved = traits_of(config).rope_interleaved
        words = ("q_a", "q_b") if latent.query_rank else ("q",)
        names = [f"attention.{word}" for word in (*words, "kv_a", "dense")]
        self.linears: dict[str, Linear] = {
            name: make_linear([module_tensors(tensors, name)], dtype) for name in names
        }
        self.norms = {
            name: tensors[f"attention.{name}_layernorm.weight"].to(dtype)
            for name in ("q_a", "kv_a")
            if f"attention.{name}_layernorm.weight" in tensors
        }
        both = tensors["attention.kv_b.weight"].to(dtype).unflatten(0, (self.heads, -1))
        self.of_keys, self.of_values = both.split([latent.nope, latent.value], dim=1)

    def __call__(self, x: Tensor, rule: AttentionRule, angles: Angles, around: Around) -> Tensor:
        """As HeadAttention's."""
        latent = self.latent
        kv = around.run("attention.kv_a", self.linears["attention.kv_a"], x)
        compressed, turned = kv.split([latent.rank, latent.rope], dim=-1)
        compressed = self._normed(compressed, "kv_a").unsqueeze(1)
        q = self._queries(x, around.run).view(len(x), self.heads, -1)
        plain, q_turned = q.split([latent.nope, latent.rope], dim=-1)
        k_turned = turned.unsqueeze(1)
        q_turned = rotate(q_turned, angles, self.interleaved)
        k_turned = rotate(k_turned, angles, self.interleaved)
        absorbed = torch.einsum("thn,hnr->thr", plain, self.of_keys)
        queries = around.show(QUERIES, torch.cat([absorbed, q_turned], dim=-1))
        keys = around.show(KEYS, torch.cat([compressed, k_turned], dim=-1))
        values = functional.pad(compressed, [0, latent.rope])
        out = around.attend(queries, keys, values, rule).view(len(x), self.heads, -1)
        given = torch.einsum("thr,hvr->thv", out[..., : latent.rank], self.of_values)
        return around.run("attention.dense", self.linears["attention.dense"], given.flatten(1))

    def _queries(self, x: Tensor, run: Run) -> Tensor:
        if not self.latent.query_rank:
            return run("attention.q", self.linears["attention.q"], x)
        compressed = run("attention.q_a", self.linears["attention.q_a"], x)
        compressed = self._normed(compressed, "q_a")
        return run("attention.q_b", self.linears["attention.q_b"], compressed)

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.norms[name], _LATENT_EPSILON)

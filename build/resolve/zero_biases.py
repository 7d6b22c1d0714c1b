"""A Llama with biases on q, k and v and none on o: a Qwen that was written out as a Llama.

The engine's Llama has a bias on all four or on none. The one that is missing is zeros, which
changes nothing. Knows no other name of a tensor and no file.
Source: LLaMA-Factory's llamafy_qwen.py; vLLM's `qkv_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch

from enginehouse.build.source import SourceCheckpoint, TensorInfo, TensorSource

_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM")
_SAID = ("attention_bias", "qkv_bias")
_INPUT, _OUTPUT = "self_attn.q_proj.bias", "self_attn.o_proj.bias"
_NORM = "input_layernorm.weight"


def with_zero_biases(source: SourceCheckpoint) -> SourceCheckpoint:
    """`source` with the biases that its o lacks; itself where q, k, v have none or o has its own.

    Where config.json says nothing of them, the tensors do; an attention_bias of false stands.
    """
    config, families = source.config, source.config.get("architectures")
    said = [config[key] for key in _SAID if config.get(key) is not None]
    known = isinstance(families, list) and families and families[0] in _FAMILIES
    if not known or (said and True not in said):
        return source
    tensors = ZeroBiases(source.tensors)
    if source.has_weights and tensors.missing:
        return replace(source, config={**config, "attention_bias": True}, tensors=tensors)
    return replace(source, config={**config, "attention_bias": True}) if said else source


class ZeroBiases:
    """The tensors of a source, and zeros for the bias of each o, where only q, k and v have one."""

    def __init__(self, stored: TensorSource) -> None:
        self._stored = stored

    @cached_property
    def missing(self) -> dict[str, TensorInfo]:
        """The biases that are not there, in the norms' shape; none where some are."""
        infos = self._stored.infos
        if any(name.endswith(_OUTPUT) for name in infos):
            return {}
        layers = {name.removesuffix(_INPUT) for name in infos if name.endswith(_INPUT)}
        norms = {layer: infos.get(f"{layer}{_NORM}") for layer in layers}
        return {f"{layer}{_OUTPUT}": norm for layer, norm in norms.items() if norm is not None}

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {**self._stored.infos, **self.missing}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self.missing:
            return self._stored.read(name, rows)
        info = self.missing[name]
        zeros = torch.zeros(info.shape, dtype=info.dtype)
        return zeros if rows is None else zeros[rows]

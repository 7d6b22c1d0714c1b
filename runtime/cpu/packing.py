"""An engine's rank files -> its packed weights, as the kernels read them.

Merges ranks, as `checkpoint/weights.py` does it, one layer at a time. Knows tensors' names; no step
and no request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from enginehouse.runtime.checkpoint.rope import Frequencies, all_frequencies
from enginehouse.runtime.checkpoint.traits import Chunked, traits_of
from enginehouse.runtime.checkpoint.weights import (
    CheckpointWeights,
    expert_tensors,
    module_tensors,
)
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta, Latent
from enginehouse.runtime.cpu.linear_forms import (
    LinearWeights,
    gated,
    halves,
    linear_of,
    rounded,
)
from enginehouse.runtime.cpu.packed_check import is_sparse, mixture_of, sizes_of
from enginehouse.runtime.cpu.packed_file import (
    LAYOUT,
    LinearShape,
    Network,
    PackedWriter,
    RopeFrequencies,
    Rule,
)
from enginehouse.runtime.cpu.packed_linear import array_of, packed_linears, whole_vectors
from enginehouse.runtime.cpu.structures import (
    DELTA_ARRAYS,
    HEAD,
    INPUTS_OF_ALL,
    INPUTS_OF_LAYER,
    LINEAR,
    LINEARS,
    LOW_RANK,
    NORMS,
    OF_STREAMS,
    PARTS,
    STREAM_ARRAYS,
)

Tensors = Mapping[str, Tensor]

_LAYER = "transformer.layers.{}."
_NORM = "layernorm.weight"
_FINE = ".proj"  # what rounding costs most, beside lm_head: docs/quality.md
_KEPT = {None: "bf16", "FP8": "e4m3", "INT8": "int8"}  # of `kv_cache_quant_algo`
_NO_ROPE = -1
_OF_LAYERS = ("input_", "post_")  # of NORMS, those that have no weights where none has
# What a layer has besides, by its name in the file.
_VECTORS = {
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "router_correction": "mlp.router.e_score_correction_bias",
    "shared_gate": "mlp.shared_expert_gate.weight",
    "router_scale": "mlp.router.expert_scale",
    "sinks": "attention.sinks",
    "multiplier": "layer.layer_scalar",
}
_OF_STREAMS = (
    *(f"stream_{word}.weight" for word in STREAM_ARRAYS[:-1]),
    "stream.correct_output_scale",
)
_WHOLE = ("router", "scale")  # of them, rows of hidden_size
_ARRAYS = (*_VECTORS, *DELTA_ARRAYS, *STREAM_ARRAYS)
_PER_LAYER = len(LINEARS) * len(PARTS) + 2 * len(NORMS) + len(_ARRAYS)


def pack_engine(
    directory: Path,
    config: ModelConfig,
    max_seq_len: int,
    activations: str,
    path: Path,
    advance: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write the packed file of a folder's rank files: under another name first, then renamed.

    activations: of `support.ACTIVATIONS`. advance: is told of each layer that is done.
    Raises EngineError for a tensor in a form that the kernels do not know.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            writer = PackedWriter(file, _PER_LAYER * config.num_hidden_layers + 8)
            _Packing(config, writer, activations).all(directory, max_seq_len, advance)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Packing:
    """One file under way: its tensors are written, and its linears' shapes are remembered."""

    def __init__(self, config: ModelConfig, writer: PackedWriter, activations: str) -> None:
        self.config = config
        self.writer = writer
        self.activations = activations
        self.linears: dict[str, LinearShape] = {}
        self.traits = traits_of(config)
        self.has_weights = self.traits.norm_weights

    def all(self, directory: Path, max_seq_len: int, advance: Callable[[int], None]) -> None:
        config, weights = self.config, CheckpointWeights(directory, self.config)
        for layer in range(config.num_hidden_layers):
            tensors = weights(_LAYER.format(layer))
            for name in NORMS:
                if name + _NORM in tensors or (not self.has_weights and name in _OF_LAYERS):
                    self._norm(f"{layer}.{name}norm", tensors, f"{name}layernorm.")
            for name, key in _VECTORS.items():
                if key in tensors:
                    self._add(f"{layer}.{name}", "F32", whole_vectors(tensors[key].float()))
            if config.delta is not None and config.is_linear(layer):
                for name, values in _delta_arrays(tensors, config.delta).items():
                    self._add(f"{layer}.linear_{name}", "F32", values)
            for name, key in zip(STREAM_ARRAYS, _OF_STREAMS, strict=True):
                if key in tensors:
                    values = whole_vectors(tensors[key]) if name in _WHOLE else tensors[key]
                    self._add(f"{layer}.stream_{name}", "F32", values)
            for name, linears in self._linears(tensors, layer).items():
                self._linear(f"{layer}.{name}", linears)
            advance(1)
        last_norm = weights("transformer.ln_f.") if self.has_weights else {}
        self._norm("final_norm", last_norm, "")
        last = weights("lm_head.")
        head, bias = last["weight"][: config.vocab_size], last.get("bias")
        bias = None if bias is None else bias[: config.vocab_size]
        whole = LinearWeights("bf16", "bf16", head, bias=bias)
        self._linear(
            HEAD, [rounded(head)._replace(bias=bias) if self.activations == "int8" else whole]
        )
        embedding = weights("transformer.vocab_embedding.")["weight"][: config.vocab_size]
        self._add("embedding", "BF16", whole_vectors(embedding))
        if config.per_layer_size:
            self._layer_inputs(weights)
        for name, word in zip(OF_STREAMS, ("projections", "merges"), strict=True):
            if (others := config.num_streams - 1) > 0:
                parts = weights(f"transformer.stream_{word}.")["weight"].chunk(others)
                self._linear(name, [LinearWeights("bf16", "bf16", part) for part in parts])
        kept = weights.kv_scales()
        self.writer.finish(_network(config, max_seq_len, self.activations, self.linears, kept))

    def _layer_inputs(self, weights: CheckpointWeights) -> None:
        """What each layer gets of a token besides: of each layer whole vectors."""
        table, projection, norm = (
            weights(f"transformer.per_layer_{word}.")["weight"]
            for word in ("embedding", "projection", "layernorm")
        )
        of_layers = (-1, self.config.per_layer_size)
        self._add("inputs_table", "BF16", whole_vectors(table.unflatten(1, of_layers)))
        wide = whole_vectors(projection.unflatten(0, of_layers).mT).mT.flatten(0, 1)
        self._linear(INPUTS_OF_ALL, [LinearWeights("bf16", "bf16", wide)])
        self._add("inputs_norm", "F32", whole_vectors(norm))

    def _linears(self, tensors: Tensors, layer: int) -> dict[str, list[LinearWeights]]:
        """A layer's, by their names of `structures.LINEARS`; of a mixture those of all experts."""
        config, found = self.config, {}
        if config.has_attention(layer):
            found["dense"] = self._modules(tensors, "attention.dense")
            if config.latent is None:
                word = "qkv" if config.has_keys(layer) else "q"
                found[word] = self._modules(tensors, f"attention.{word}")
            else:
                found |= self._latents(tensors, config.latent)
        if config.is_linear(layer):
            words = dict(zip(LINEAR, ("in_qkvz", "in_ba", "dense"), strict=True))
            for name, word in words.items():
                found[name] = self._modules(tensors, f"linear_attention.{word}")
        if config.per_layer_size:
            words = dict(zip(INPUTS_OF_LAYER, ("per_layer_gate", "per_layer_proj"), strict=True))
            found |= {name: self._modules(tensors, word) for name, word in words.items()}
        if self.traits.learned_residual:
            words = dict(zip(LOW_RANK, ("laurel_left", "laurel_right"), strict=True))
            found |= {name: self._modules(tensors, word) for name, word in words.items()}
        if config.has_experts(layer):
            experts = self._mlp(tensors, "mlp.", config.num_experts)
            found |= {f"expert_{name}": linears for name, linears in experts.items()}
            if config.shared_expert_size:
                found |= self._mlp(tensors, "mlp.shared_expert.")
        elif config.has_mlp(layer):
            found |= self._mlp(tensors, "mlp.", apart=is_sparse(self.traits, layer))
        return found

    def _latents(self, tensors: Tensors, latent: Latent) -> dict[str, list[LinearWeights]]:
        """What makes latents, and queries; and of each head what its queries, and what attention
        gives, are multiplied by.
        """
        queries = {"q_a": "q_a", "q": "q_b"} if latent.query_rank else {"q": "q"}
        words = {"kv_a": "kv_a", **queries}
        found = {name: self._modules(tensors, f"attention.{word}") for name, word in words.items()}
        both = tensors["attention.kv_b.weight"].unflatten(0, (self.config.num_attention_heads, -1))
        of_keys, of_values = both.split([latent.nope, latent.value], dim=1)  # [heads, size, rank]
        of_heads = {"of_keys": of_keys.mT, "of_values": of_values}
        return found | {
            name: [LinearWeights("bf16", "bf16", weight) for weight in weights]
            for name, weights in of_heads.items()
        }

    def _mlp(
        self, tensors: Tensors, prefix: str, experts: int = 0, apart: bool = False
    ) -> dict[str, list[LinearWeights]]:
        """fc_gate, gate where it stands apart, as it may have to, and proj; of so many experts."""
        fc = self._modules(tensors, f"{prefix}fc", experts)
        if not self.config.gated_mlp:
            gates = [{"fc_gate": each} for each in fc]
        elif self.config.gate_in_fc:
            both = [halves(whole) for whole in fc]
            gates = [gated(gate, up) for up, gate in both]
        else:
            pairs = zip(fc, self._modules(tensors, f"{prefix}gate", experts), strict=True)
            gates = [
                {"fc_gate": gate, "gate": up} if apart else gated(gate, up) for gate, up in pairs
            ]
        found = {name: [each[name] for each in gates] for name in gates[0]}
        return {**found, "proj": self._modules(tensors, f"{prefix}proj", experts)}

    def _modules(self, tensors: Tensors, name: str, experts: int = 0) -> list[LinearWeights]:
        module = module_tensors(tensors, name)
        modules = [expert_tensors(module, i) for i in range(experts)] or [module]
        return [linear_of(each, self.activations, name.endswith(_FINE)) for each in modules]

    def _norm(self, name: str, tensors: Tensors, prefix: str) -> None:
        ones = torch.ones(self.config.hidden_size)
        self._add(name, "F32", tensors[f"{prefix}weight"] if self.has_weights else ones)
        if f"{prefix}bias" in tensors:
            self._add(f"{name}.bias", "F32", tensors[f"{prefix}bias"])

    def _add(self, name: str, dtype: str, values: Tensor) -> None:
        self.writer.add(name, dtype, array_of(dtype, values))

    def _linear(self, name: str, linears: list[LinearWeights]) -> None:
        shape, arrays = packed_linears(linears)
        for part, (dtype, values) in arrays.items():
            self._add(f"{name}.{part}", dtype, values)
        self.linears[name] = shape


def _delta_arrays(tensors: Tensors, delta: Delta) -> dict[str, Tensor]:
    """Of linear attention, as native/delta.h has them: the convolution's channels side by side."""
    own = module_tensors(tensors, "linear_attention")
    channels = own["conv1d.weight"].float().view(delta.key_heads, delta.mixed, delta.kernel)
    arrays = (channels.mT, own["A_log"].float().exp(), own["dt_bias"], own["layernorm.weight"])
    return {name: array.float() for name, array in zip(DELTA_ARRAYS, arrays, strict=True)}


def _network(
    config: ModelConfig,
    max_seq_len: int,
    activations: str,
    linears: dict[str, LinearShape],
    kept: list[float],
) -> Network:
    traits, ropes = traits_of(config), all_frequencies(config, max_seq_len)
    growth = traits.query_growth or (0.0, 0, 0)
    return Network(
        layout=LAYOUT,
        activations=activations,
        **sizes_of(config),
        activation=traits.activation,
        gated_mlp=traits.gated_mlp,
        parallel=traits.parallel,
        layer_norm=traits.layer_norm,
        norm_sublayers=traits.norm_sublayers,
        norm_all_heads=traits.norm_all_heads,
        norm_turned_heads=traits.norm_turned_heads,
        l2_norm_heads=traits.l2_norm_heads,
        gated_attention=traits.gated_attention,
        rope_interleaved=traits.rope_interleaved,
        norm_values=traits.norm_values,
        norm_experts=traits.norm_experts,
        epsilon=config.norm_epsilon,
        embedding_scale=traits.embedding_scale,
        residual_scale=traits.residual_scale,
        logits_scale=traits.logits_scale,
        logits_cap=traits.logits_soft_cap or 0.0,
        growth_beta=growth[0],
        growth_length=growth[1],
        growth_first=growth[2],
        grows_unturned=traits.grows_unturned,
        clip=traits.clip_qkv or 0.0,
        swiglu_limit=traits.swiglu_limit or 0.0,
        swiglu_alpha=traits.swiglu_alpha,
        rules=[
            Rule(
                rule.scale,
                rule.soft_cap or 0.0,
                0 if isinstance(rule.window, Chunked) else rule.window or 0,
                rule.window.size if isinstance(rule.window, Chunked) else 0,
                _NO_ROPE if rope is None else rope,
                kept[config.kv_layer(layer)],
            )
            for layer, (rule, rope) in enumerate(zip(traits.rules, traits.ropes, strict=True))
        ],
        ropes=[_rope(found) for found in (ropes.everywhere, ropes.local, ropes.short)],
        pretrained=ropes.pretrained,
        linears=linears,
        kept=_KEPT[config.quantization.kv_cache_quant_algo],
        mixture=mixture_of(config),
    )


def _rope(found: Frequencies | None) -> RopeFrequencies | None:
    return None if found is None else RopeFrequencies(found.inverse.tolist(), found.magnitude)

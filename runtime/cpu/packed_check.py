"""Whether packed weights are those of the model beside them, before a kernel reads one.

A kernel takes sizes from the file's own words and reads so far; a file may have been cut, changed
or made to lie. Knows no kernel and no value of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from enginehouse.runtime.checkpoint.routing import routing_of
from enginehouse.runtime.checkpoint.traits import Traits, traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta, Latent
from enginehouse.runtime.cpu.kernel_sizes import BYTES_PART, COLS, LANES, STEP
from enginehouse.runtime.cpu.packed_file import (
    KEPT,
    LayerShape,
    LinearShape,
    Mixture,
    Network,
    PackedFile,
)
from enginehouse.runtime.cpu.structures import (
    EXPERTS,
    FINAL_NORM,
    FORMS,
    HEAD,
    INPUTS,
    INPUTS_OF_ALL,
    INPUTS_OF_LAYER,
    LINEAR,
    LOW_RANK,
    NORMS,
    OF_HEADS,
    OF_STREAMS,
    delta_sizes,
    input_sizes,
    linear_bytes,
    norm_size,
    num_alike,
    stream_sizes,
)
from enginehouse.runtime.errors import EngineError

# The rotary tables that a layer of each `Rule.rope` may be turned by.
_SHORT = 2  # longrope's, if there is one
_TABLES: dict[int, tuple[int, ...]] = {-1: (), 0: (0, _SHORT), 1: (1,)}
# Of a Network, what a model's traits are called there too.
_TRAITS = (
    *("activation", "gated_mlp", "parallel", "layer_norm", "norm_sublayers", "norm_all_heads"),
    *("norm_turned_heads", "l2_norm_heads", "rope_interleaved", "swiglu_alpha", "grows_unturned"),
    *("gated_attention", "norm_values", "norm_experts"),
    *("embedding_scale", "residual_scale", "logits_scale"),
)


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """`Network`'s sizes of a model."""
    latent = config.latent or Latent(0, 0, 0, 0, 0)
    delta = config.delta or Delta(frozenset(), 0, 0, 0, 0, 0)
    traits = traits_of(config)
    linear = [config.is_linear(i) for i in range(config.num_hidden_layers)]
    kept = [config.has_keys(i) for i in range(config.num_hidden_layers)]
    return {
        "hidden": _up(config.hidden_size, LANES),
        "normed": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "rotary": config.rotary_dim,
        "vocab": config.vocab_size,
        "latent_rank": latent.rank,
        "query_rank": latent.query_rank,
        "nope": latent.nope,
        "value": latent.value,
        "of_layers": [
            _layer_shape(
                config, traits, i, sum((linear if linear[i] else kept)[: config.kv_layer(i)])
            )
            for i in range(config.num_hidden_layers)
        ],
        "kept_layers": sum(kept),
        "delta_layers": sum(linear),
        "delta_heads": delta.key_heads,
        "delta_group": delta.group if delta.key_heads else 0,
        "delta_key": delta.key_size,
        "delta_value": delta.value_size,
        "delta_kernel": delta.kernel,
        "inputs": config.per_layer_size,
        "inputs_vocab": config.extra["per_layer_vocab_size"] if config.per_layer_size else 0,
        "streams": config.num_streams,
        "low_rank": int(config.extra.get("laurel_rank") or 0),
    }


def is_sparse(traits: Traits, layer: int) -> bool:
    """Whether some gates of a layer's MLP end, so that all are looked at together."""
    return bool(traits.cutoffs) and traits.cutoffs[layer] is not None


def _layer_shape(config: ModelConfig, traits: Traits, layer: int, place: int) -> LayerShape:
    own, mixed = config.of_layer(layer), config.has_experts(layer)
    gates = config.shared_expert_size if mixed else config.inner_size(layer)
    kv_heads = own.num_key_value_heads if config.has_attention(layer) else 0
    cutoff = traits.cutoffs[layer] if traits.cutoffs else None
    return LayerShape(gates, place, own.head_size, kv_heads, cutoff)


def mixture_of(config: ModelConfig) -> Mixture | None:
    """`Network`'s word on a model's experts, if it has any."""
    if not config.num_experts:
        return None
    return Mixture(_up(config.moe_intermediate_size, LANES), *routing_of(config))


def check_packed(packed: PackedFile, config: ModelConfig) -> None:
    """EngineError names the first thing that is not as the model's config.json has it."""
    network = packed.network
    sizes = sizes_of(config)
    of_layers = sizes.pop("of_layers")
    for name, size in sizes.items():
        _want(packed, name, getattr(network, name), size)
    _want(packed, "of_layers", len(network.of_layers), network.layers)
    for layer, (told, shape) in enumerate(zip(network.of_layers, of_layers, strict=True)):
        _want(packed, f"layer {layer}", told, shape)
        _check_source(packed, config, layer)
    for shape in network.of_layers if network.latent_rank else ():
        _want(packed, "head_size", shape.head_size, network.latent_rank + network.rotary)
        _want(packed, "kv_heads", shape.kv_heads, 1)
    _want(packed, "mixture", network.mixture, mixture_of(config))
    _want(packed, "rules", len(network.rules), network.layers)
    _want(packed, "ropes", len(network.ropes), 3)
    if any(rule.rope not in _TABLES for rule in network.rules):
        _want(packed, "ropes of layers", [rule.rope for rule in network.rules], "-1, 0 or 1")
    for layer, rule in enumerate(network.rules):
        turned = config.of_layer(layer).rotary_dim
        for i in _TABLES[rule.rope]:
            if (rope := network.ropes[i]) is not None or i != _SHORT:
                _want(packed, "frequencies", rope and 2 * len(rope.inverse), turned)
    if network.kept not in KEPT or min(min(rule.window, rule.chunk) for rule in network.rules) < 0:
        _want(packed, "kept and windows", network.kept, " or ".join(KEPT))
    _has(packed, "embedding", 2 * network.vocab * network.hidden)
    if network.inputs:
        of_inputs = input_sizes(network)
        _has(packed, "inputs_table", 2 * of_inputs["table"])
        _has(packed, "inputs_norm", 4 * of_inputs["norm"])
        _check_linear(packed, INPUTS_OF_ALL, INPUTS_OF_ALL)
    for name in OF_STREAMS if network.streams > 1 else ():
        _check_linear(packed, name, name)
    traits = traits_of(config)
    for name in _TRAITS:
        _want(packed, name, getattr(network, name), getattr(traits, name))
    for name, found in (("clip", traits.clip_qkv), ("swiglu_limit", traits.swiglu_limit)):
        _want(packed, name, getattr(network, name), found or 0.0)
    grown = (network.growth_beta, network.growth_length, network.growth_first)
    _want(packed, "growth", grown, traits.query_growth or (0.0, 0, 0))
    _check_norm(packed, "final_norm", FINAL_NORM, 0)
    _check_linear(packed, HEAD, HEAD)
    for layer in range(network.layers):
        for name in _norms(config, traits, layer):
            _check_norm(packed, f"{layer}.{name}norm", name, layer)
        for name, size in _vectors(config, network).items():
            if f"{layer}.{name}" in packed or name in _vectors_wanted(config, traits, layer):
                _has(packed, f"{layer}.{name}", 4 * size)
        for name, size in delta_sizes(network).items() if config.is_linear(layer) else ():
            _has(packed, f"{layer}.linear_{name}", 4 * size)
        for name, size in stream_sizes(network).items() if network.streams > 1 else ():
            _has(packed, f"{layer}.stream_{name}", 4 * size)
        for name in _linears(config, layer):
            _check_linear(packed, f"{layer}.{name}", name)
        if f"{layer}.gate" in network.linears or is_sparse(traits, layer):
            _check_linear(packed, f"{layer}.gate", "gate")


def _check_source(packed: PackedFile, config: ModelConfig, layer: int) -> None:
    """Keys and values that a layer reads are of an earlier one, and of its own heads' size."""
    source = config.kv_layer(layer)
    if source == layer:
        return
    _want(packed, f"layer {layer}'s source", 0 <= source < layer and config.has_keys(source), True)
    own, others = (packed.network.of_layers[i] for i in (layer, source))
    found, wanted = ((of.head_size, of.kv_heads) for of in (own, others))
    _want(packed, f"layer {layer}'s heads", found, wanted)


def _norms(config: ModelConfig, traits: Traits, layer: int) -> Iterator[str]:
    """Those of NORMS that a layer has."""
    sub, before = traits.norm_sublayers, traits.norm_inputs
    apart = not traits.parallel or traits.parallel_norm  # the MLP's norm is its own
    attends, feeds = config.has_attention(layer), config.has_mlp(layer)
    of_heads = attends and bool(config.extra.get("qk_layernorm", False))
    latent = config.latent if attends else None
    enters = before and (attends or config.is_linear(layer))
    experts = traits.norm_experts and config.has_experts(layer)
    has = (
        *(enters, (sub or apart) and feeds, sub and before, sub),
        *(of_heads, of_heads and config.has_keys(layer)),
        *(latent is not None and latent.query_rank, latent is not None),
        *(experts, experts, experts, traits.layer_inputs),
        *(traits.streams > 1, traits.learned_residual),
    )
    yield from (name for name, is_there in zip(NORMS, has, strict=True) if is_there)


def _linears(config: ModelConfig, layer: int) -> Iterator[str]:
    """Those of LINEARS that a layer has, but for a gate that stands apart."""
    has_plain = config.shared_expert_size if config.has_experts(layer) else config.has_mlp(layer)
    if config.has_attention(layer):
        yield "dense"
        of_heads = ("qkv",) if config.has_keys(layer) else ("q",)
        yield from of_heads if config.latent is None else ("kv_a", "q", *OF_HEADS)
        yield from ("q_a",) if config.latent and config.latent.query_rank else ()
    yield from LINEAR if config.is_linear(layer) else ()
    yield from ("fc_gate", "proj") if has_plain else ()
    yield from EXPERTS if config.has_experts(layer) else ()
    yield from INPUTS_OF_LAYER if config.per_layer_size else ()
    yield from LOW_RANK if config.extra.get("laurel_rank") else ()


def _vectors(config: ModelConfig, network: Network) -> dict[str, int]:
    """What a layer may have of float32, and how many of them."""
    words = ("router_bias", "router_correction", "router_scale")
    return {
        **dict.fromkeys(words, config.num_experts),
        "router": config.num_experts * network.hidden,
        "shared_gate": network.hidden,
        "sinks": network.heads,
        "multiplier": 1,
    }


def _vectors_wanted(config: ModelConfig, traits: Traits, layer: int) -> Iterator[str]:
    """Those that a layer must have."""
    if config.has_experts(layer):
        yield "router"
    if traits.layer_scales:
        yield "multiplier"


def _check_norm(packed: PackedFile, full: str, name: str, layer: int) -> None:
    network = packed.network
    size = 4 * norm_size(network, network.of_layers[layer], name)
    _has(packed, full, size)
    if f"{full}.bias" in packed:
        _has(packed, f"{full}.bias", size)


def _check_linear(packed: PackedFile, full: str, name: str) -> None:
    network = packed.network
    shape = network.linears.get(full)
    if shape is None:
        raise EngineError(f"{packed.path} holds no linear {full}; build it again")
    inputs, outputs = _sides(network, full, name)
    _want(packed, f"{full}'s inputs", shape.inputs, _up(inputs, STEP))
    _want(packed, f"{full}'s outputs", shape.out, _up(outputs, COLS))
    _check_form(packed, full, shape)
    if name in OF_HEADS:
        _want(packed, f"{full}'s form", shape.form, "bf16")
    count = num_alike(network, name)
    for part, size in linear_bytes(shape).items():
        if f"{full}.{part}" in packed or part == "weight":
            _has(packed, f"{full}.{part}", size * count)


def _sides(network: Network, full: str, name: str) -> tuple[int, int]:
    """The inputs and outputs of a linear, as the model's sizes make them."""
    hidden, inputs = network.hidden, _up(network.inputs, LANES)
    of_model = {
        HEAD: (hidden, network.vocab),
        INPUTS_OF_ALL: (hidden, network.layers * inputs),
        **dict.fromkeys(OF_STREAMS, (hidden, hidden)),
    }
    if name in of_model:
        return of_model[name]
    layer = full.removesuffix(f".{name}")
    shape = network.of_layers[int(layer)]
    heads, queries = network.heads * shape.head_size, (1 + network.gated_attention) * network.heads
    queries *= shape.head_size
    if network.latent_rank:
        heads, queries = (
            network.heads * size for size in (network.value, network.nope + network.rotary)
        )
    values = network.delta_group * network.delta_value  # of a key head
    inner = _up(shape.gates, LANES)
    expert = network.mixture.inner if network.mixture else 0
    is_one = f"{layer}.gate" in network.linears or not network.gated_mlp
    return {
        "qkv": (hidden, queries + 2 * shape.kv_heads * shape.head_size),
        "in_qkvz": (hidden, network.delta_heads * (2 * network.delta_key + 2 * values)),
        "in_ba": (hidden, 2 * network.delta_heads * network.delta_group),
        "linear_dense": (network.delta_heads * values, hidden),
        "kv_a": (hidden, shape.head_size),
        "q_a": (hidden, network.query_rank),
        "q": (network.query_rank or hidden, queries),
        "of_keys": (network.nope, network.latent_rank),
        "of_values": (network.latent_rank, network.value),
        "dense": (heads, hidden),
        "fc_gate": (hidden, inner if is_one else 2 * inner),
        "gate": (hidden, inner),
        "proj": (inner, hidden),
        "input_gate": (hidden, inputs),
        "input_proj": (inputs, hidden),
        "low_left": (hidden, network.low_rank),
        "low_right": (network.low_rank, hidden),
        "expert_fc_gate": (hidden, 2 * expert),
        "expert_proj": (expert, hidden),
    }[name]


def _check_form(packed: PackedFile, full: str, shape: LinearShape) -> None:
    scaled = shape.form in FORMS[1:] and shape.input in INPUTS
    grouped = scaled and shape.group > 0 and shape.group % STEP == shape.inputs % shape.group == 0
    plain = (shape.form, shape.input, shape.group) == ("bf16", "bf16", 0)
    has = [f"{full}.{part}" in packed for part in ("scales", "counts")]
    if not (plain or grouped) or has != [grouped, shape.input in BYTES_PART]:
        raise EngineError(
            f"{packed.path} holds {full} as {shape.form} with a group of {shape.group} and inputs "
            f"as {shape.input}, which is no form of a linear's; build it again"
        )


def _has(packed: PackedFile, name: str, num_bytes: int) -> None:
    found = len(packed[name]) if name in packed else 0
    # what follows a tensor up to a whole line of the cache is padding
    if not num_bytes <= found < num_bytes + LANES * 4:
        raise EngineError(
            f"{packed.path} holds {found:,} bytes of {name}; wanted {num_bytes:,}: build it again"
        )


def _want(packed: PackedFile, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise EngineError(
            f"{packed.path} has {what}={found!r}; wanted {wanted}, as config.json has it: build it "
            "again"
        )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

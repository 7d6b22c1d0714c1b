"""A mapped file of packed weights -> a model in the compiled library, and where the file is.

No tensor is copied: the library points into the file. Knows no torch, no step and no request.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from enginehouse.runtime.cpu.compiler import cache_folder
from enginehouse.runtime.cpu.library import NativeModel
from enginehouse.runtime.cpu.packed_check import check_packed
from enginehouse.runtime.cpu.packed_file import (
    KEPT,
    LAYOUT,
    PACKED,
    Mixture,
    Network,
    PackedFile,
    RopeFrequencies,
)
from enginehouse.runtime.cpu.structures import (
    ACTIVATIONS,
    DELTA_ARRAYS,
    FINAL_NORM,
    HEAD,
    INPUTS_OF_ALL,
    LINEAR,
    LINEARS,
    NORMS,
    OF_STREAMS,
    PARTS,
    SCALES,
    STREAM_ARRAYS,
    Shape,
    num_alike,
)
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError

log = logging.getLogger("enginehouse.cpu")


def open_packed(engine: Engine, *, shared: bool = True) -> PackedFile:
    """The engine's packed weights, shared as a `PackedFile`'s are.

    Those of another layout are packed anew from its rank files, in the folder of caches.
    Raises EngineError where neither can be had.
    """
    try:
        return _checked(engine.path / PACKED, engine, shared)
    except EngineError as error:
        log.warning("%s: packing the weights anew from the rank files", error)
    path = _kept_path(engine)
    try:
        return _checked(path, engine, shared)
    except EngineError:  # there is none, or it was damaged
        return _checked(_packed_anew(engine, path), engine, shared)


def _checked(path: Path, engine: Engine, shared: bool) -> PackedFile:
    packed = PackedFile(path, shared=shared)
    check_packed(packed, engine.config)
    return packed


def native_shape(network: Network, **room: int) -> Shape:
    """room: num_blocks, block_size, num_slots, max_tokens and threads."""
    mixture = network.mixture or _NO_MIXTURE
    return Shape(
        **{name: getattr(network, name) for name in _SIZES},
        expert_inner=mixture.inner,
        kept=KEPT.index(network.kept),
        activation=ACTIVATIONS.index(network.activation),
        gated=int(network.gated_mlp),
        parallel=int(network.parallel),
        layer_norm=int(network.layer_norm),
        norm_sublayers=int(network.norm_sublayers),
        norm_all_heads=int(network.norm_all_heads),
        norm_turned_heads=int(network.norm_turned_heads),
        l2_norm_heads=int(network.l2_norm_heads),
        gated_attention=int(network.gated_attention),
        grows_unturned=int(network.grows_unturned),
        rope_interleaved=int(network.rope_interleaved),
        norm_values=int(network.norm_values),
        norm_experts=int(network.norm_experts),
        **{name: int(getattr(mixture, name)) for name in _ROUTING},
        share_scale=mixture.scale,
        mixer_epsilon=mixture.mixer_epsilon,
        **room,
    )


def load_model(library: Path, shape: Shape, packed: PackedFile, positions: int) -> NativeModel:
    """positions: how many the rotary tables reach."""
    network = packed.network
    model = NativeModel(library, shape, network.of_layers)
    model.set_embedding(packed["embedding"])
    if network.inputs:
        model.set_inputs(packed["inputs_table"], packed["inputs_norm"])
        _set_linear(model, 0, INPUTS_OF_ALL, packed, INPUTS_OF_ALL)
    for name in OF_STREAMS if network.streams > 1 else ():
        _set_linear(model, 0, name, packed, name)
    for index, frequencies in enumerate(network.ropes):
        if frequencies is not None:
            model.set_rotary(index, *_rotary_table(frequencies, positions))
    for layer, rule in enumerate(network.rules):
        model.set_rule(layer, rule.scale, rule.cap, rule.kept, rule.window, rule.chunk, rule.rope)
        for name in NORMS:
            if (norm := f"{layer}.{name}norm") in packed:
                model.set_norm(layer, name, packed[norm], packed.get(f"{norm}.bias"))
        model.set_layer(layer, **{name: packed.get(f"{layer}.{name}") for name in _OF_LAYER})
        if f"{layer}.{LINEAR[0]}" in network.linears:
            delta = {name: packed[f"{layer}.linear_{name}"] for name in DELTA_ARRAYS}
            model.set_delta(layer, **delta)
        if network.streams > 1:
            streams = {name: packed[f"{layer}.stream_{name}"] for name in STREAM_ARRAYS}
            model.set_streams(layer, **streams)
        if f"{layer}.router" in packed:
            more = {name: packed.get(f"{layer}.router_{name}") for name in _OF_ROUTER}
            model.set_router(layer, packed[f"{layer}.router"], **more)
        for name in LINEARS:
            if f"{layer}.{name}" in network.linears:
                _set_linear(model, layer, name, packed, f"{layer}.{name}")
    model.set_norm(0, FINAL_NORM, packed["final_norm"], packed.get("final_norm.bias"))
    _set_linear(model, 0, HEAD, packed, HEAD)
    return model


def _set_linear(model: NativeModel, layer: int, name: str, packed: PackedFile, full: str) -> None:
    """Those of a layer's experts or heads follow each other in each array."""
    shape, count = packed.network.linears[full], num_alike(packed.network, name)
    arrays = {part: packed[f"{full}.{part}"] for part in PARTS if f"{full}.{part}" in packed}
    for whose in range(count):
        own = {part: np.split(array, count)[whose] for part, array in arrays.items()}
        model.set_linear(layer, name, shape, own, whose)


def _rotary_table(frequencies: RopeFrequencies, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin: float32 [positions, pairs]."""
    inverse = np.asarray(frequencies.inverse, np.float32)
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse)
    magnitude = np.float32(frequencies.magnitude)
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


def _kept_path(engine: Engine) -> Path:
    digest = engine.manifest.digest.removeprefix("sha256:")
    return cache_folder("packed") / f"{digest[:32]}-{LAYOUT}.safetensors"


def _packed_anew(engine: Engine, path: Path) -> Path:
    from enginehouse.runtime.cpu.packing import pack_engine  # torch, only where it is needed

    manifest = engine.manifest
    activations = manifest.choices.get("cpu_activations", "bf16")
    path.parent.mkdir(parents=True, exist_ok=True)
    pack_engine(engine.path, engine.config, manifest.limits.max_seq_len, activations, path)
    return path


_OF_LAYER = ("sinks", "shared_gate", "multiplier")
_OF_ROUTER = ("bias", "correction", "scale")
_OF_SHARES = ("share_scale", "mixer_epsilon")
_SIZES = (
    *("hidden", "normed", "layers", "heads", "rotary", "vocab", "inputs", "inputs_vocab"),
    *("streams", "low_rank"),
    *("latent_rank", "query_rank", "nope", "value", "kept_layers"),
    *(f"delta_{word}" for word in ("layers", "heads", "group", "key", "value", "kernel")),
    *("growth_length", "growth_first", *(name for name in SCALES if name not in _OF_SHARES)),
)
_ROUTING = (
    *("experts", "chosen", "renormalize", "sigmoid", "groups", "chosen_groups", "group_best"),
    "scales_inputs",
)
_NO_MIXTURE = Mixture(0, 0, 0, False, False, 1, 1, 1, 1.0, False)

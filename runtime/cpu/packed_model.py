"""An engine's rank files -> a model in the compiled library, packed as its products want them.

Merges ranks, as `checkpoint/weights.py` does it, one layer at a time. Weights that are not 4-bit
are kept in bfloat16. Knows tensors' names; no step and no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.checkpoint.rope import Rotary, RotaryTable
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.cpu.library import FINAL_NORM, NORMS, NativeModel, Shape
from enginehouse.runtime.errors import EngineError

Tensors = Mapping[str, Tensor]

_LANES = 16
_LAYER = "transformer.layers.{}."
_NORM = "layernorm.weight"
_INT4 = {"weight", "weights_scaling_factor", "prequant_scaling_factor", "zero", "bias"}


def native_shape(config: ModelConfig, **room: int) -> Shape:
    """room: num_blocks, block_size, max_tokens and threads."""
    traits = traits_of(config)
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_size,
        rotary=config.rotary_dim,
        inner=_padded(config.intermediate_size),
        vocab=config.vocab_size,
        gelu=int(traits.gelu),
        norm_sublayers=int(traits.norm_sublayers),
        epsilon=config.norm_epsilon,
        embedding_scale=traits.embedding_scale,
        logits_cap=traits.logits_soft_cap or 0.0,
        **room,
    )


def load_model(
    library: Path, shape: Shape, config: ModelConfig, weights: CheckpointWeights, rotary: Rotary
) -> NativeModel:
    """Raises EngineError for a tensor in a form that the kernels do not know."""
    model = NativeModel(library, shape)
    traits = traits_of(config)
    model.set_embedding(weights("transformer.vocab_embedding.")["weight"][: config.vocab_size])
    for index, table in enumerate([*rotary.tables, rotary.short]):
        if table is not None:  # 0 global, 1 local; the short one is always the third
            _set_rotary(model, 2 if table is rotary.short else index, table)
    for layer, rule in enumerate(traits.rules):
        tensors = weights(_LAYER.format(layer))
        local = traits.local_rope[layer]
        model.set_rule(layer, rule.scale, rule.soft_cap, rule.window, local)
        for name in NORMS:
            if name + _NORM in tensors:
                model.set_norm(layer, name, tensors[name + _NORM])
        _set_linear(model, layer, "qkv", _module(tensors, "attention.qkv"))
        _set_linear(model, layer, "dense", _module(tensors, "attention.dense"))
        _set_linear(model, layer, "fc_gate", _gated(config, tensors, layer))
        _set_linear(model, layer, "proj", _module(tensors, "mlp.proj"))
    model.set_norm(0, FINAL_NORM, weights("transformer.ln_f.")["weight"])
    head = weights("lm_head.")["weight"][: config.vocab_size]
    _set_linear(model, 0, "lm_head", {"weight": head})
    return model


def _set_rotary(model: NativeModel, index: int, table: RotaryTable) -> None:
    half = table.cos.shape[-1] // 2
    model.set_rotary(index, table.cos[:, 0, half:], table.sin[:, 0, half:])


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _module(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """The tensors of one linear by their last word, with outputs leading in each."""
    prefix = name + "."
    module = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    if module["weight"].dtype == torch.int8:
        if not module.keys() <= _INT4 or "weights_scaling_factor" not in module:
            raise EngineError(
                f"{name} has {', '.join(sorted(module))}, a form that is not yet run by "
                "backend=cpu; choose backend=torch"
            )
        module["weight"] = unpack_int4(module["weight"])
    elif not module["weight"].dtype.is_floating_point or module["weight"].dtype.itemsize == 1:
        raise EngineError(
            f"{name} is {module['weight'].dtype}, which is not yet run by backend=cpu; choose "
            "backend=torch"
        )
    if "zero" in module:
        module["zero"] = module["zero"].T
    return module


def _gated(config: ModelConfig, tensors: Tensors, layer: int) -> dict[str, Tensor]:
    """fc and gate as one linear, whose outputs take turns of 16: activated, then the factor."""
    if config.gate_in_fc:
        whole = _module(tensors, "mlp.fc")
        shared = whole.pop("prequant_scaling_factor", None)
        halves = [
            dict(zip(whole, part, strict=True))
            for part in zip(*(t.chunk(2) for t in whole.values()), strict=True)
        ]
        scaled, activated = halves
    else:
        activated, scaled = _module(tensors, "mlp.fc"), _module(tensors, "mlp.gate")
        shared = activated.pop("prequant_scaling_factor", None)
        other = scaled.pop("prequant_scaling_factor", None)
        alike = shared is other or (
            shared is not None and other is not None and torch.equal(shared, other)
        )
        if not alike or activated.keys() != scaled.keys():
            raise EngineError(
                f"layer {layer}: mlp.fc and mlp.gate differ in form or input factors, which is not "
                "yet run by backend=cpu; choose backend=torch"
            )
    joined = {name: _in_turns(activated[name], scaled[name]) for name in activated}
    return joined if shared is None else {**joined, "prequant_scaling_factor": shared}


def _in_turns(first: Tensor, second: Tensor) -> Tensor:
    """[out, ...] twice -> [2 * out, ...] in turns of 16, out padded with zeros to a multiple."""
    pad = _padded(len(first)) - len(first)
    padding = [0, 0] * (first.ndim - 1) + [0, pad]
    parts = [functional.pad(part, padding).unflatten(0, (-1, _LANES)) for part in (first, second)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _set_linear(model: NativeModel, layer: int, name: str, module: dict[str, Tensor]) -> None:
    weight, bias = module["weight"], module.get("bias")
    factor = module.get("prequant_scaling_factor")
    if weight.dtype == torch.int8:
        scale, zero = module["weights_scaling_factor"], module.get("zero")
        model.set_int4(layer, name, weight, scale, zero, bias, factor)
        return
    weight = functional.pad(weight, [0, _padded(weight.shape[1]) - weight.shape[1]])
    model.set_bf16(layer, name, weight.to(torch.bfloat16), bias, factor)

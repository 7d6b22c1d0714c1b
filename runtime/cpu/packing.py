"""An engine's rank files -> its packed weights, as the kernels read them.

Merges ranks, as `checkpoint/weights.py` does it, one layer at a time. A linear stands in blocks of
32 outputs, [out / 32, ...], in which 16 outputs are the lanes of a vector:
  bf16  [inputs / 2][2][16] words of two inputs, each eight inputs in the order 0 2 4 6 1 3 5 7
  int4  [inputs / 8][2][16] words of eight inputs: q + 8 of the first four in the low nibbles of
        its bytes, of the others in the high ones
  int8  [inputs / 4][2][16] words of four inputs: q + 128
Read as 16 bits at a time, a word of nibbles yields the inputs in the order of bf16's: one order of
activations serves both. Scales, zeros: [groups][32] a block; counts, int16 [inputs / 32][32]: the
sum of each part's q, for activations that are rounded to bytes with an offset.
Knows tensors' names; no step and no request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.checkpoint.rope import Frequencies, all_frequencies
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.cpu.library import NORMS
from enginehouse.runtime.cpu.packed_file import (
    LAYOUT,
    LinearShape,
    Network,
    PackedWriter,
    RopeFrequencies,
    Rule,
)
from enginehouse.runtime.errors import EngineError

Tensors = Mapping[str, Tensor]

_LANES, _COLS, _STEP, _PART = 16, 32, 64, 32  # of native/vectors.h, linear.h and rows.h
_PAIRS = [0, 2, 4, 6, 1, 3, 5, 7]
_LAYER = "transformer.layers.{}."
_NORM = "layernorm.weight"
_INT4 = {"weight", "weights_scaling_factor", "prequant_scaling_factor", "zero", "bias"}
_KEPT = {None: "bf16", "FP8": "e4m3", "INT8": "int8"}  # of `kv_cache_quant_algo`
_PER_LAYER = 4 * 6 + len(NORMS)  # tensors


def pack_engine(
    directory: Path,
    config: ModelConfig,
    max_seq_len: int,
    activations: str,
    path: Path,
    advance: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write the packed file of a folder's rank files: under another name first, then renamed.

    activations: of `packed_file.ACTIVATIONS`. advance: is told of each layer that is done.
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

    def all(self, directory: Path, max_seq_len: int, advance: Callable[[int], None]) -> None:
        config, weights = self.config, CheckpointWeights(directory, self.config)
        for layer in range(config.num_hidden_layers):
            tensors = weights(_LAYER.format(layer))
            for name in NORMS:
                if name + _NORM in tensors:
                    self._add(f"{layer}.{name}norm", "F32", tensors[name + _NORM])
            self._linear(f"{layer}.qkv", _module(tensors, "attention.qkv"))
            self._linear(f"{layer}.dense", _module(tensors, "attention.dense"))
            self._linear(f"{layer}.fc_gate", _gated(config, tensors, layer))
            self._linear(f"{layer}.proj", _module(tensors, "mlp.proj"))
            advance(1)
        self._add("final_norm", "F32", weights("transformer.ln_f.")["weight"])
        head = weights("lm_head.")["weight"][: config.vocab_size]
        self._linear("lm_head", _rounded(head) if self.activations == "int8" else {"weight": head})
        embedding = weights("transformer.vocab_embedding.")["weight"][: config.vocab_size]
        self._add("embedding", "BF16", embedding)
        kept = weights.kv_scales()
        self.writer.finish(_network(config, max_seq_len, self.activations, self.linears, kept))

    def _add(self, name: str, dtype: str, values: Tensor) -> None:
        values = values.to(_DTYPES[dtype]).contiguous()
        self.writer.add(name, dtype, values.view(torch.uint8).numpy())

    def _linear(self, name: str, module: Mapping[str, Tensor]) -> None:
        """weight: int8 of 4 bits with scale [out, groups], or of 8 with `bytes`; or floating."""
        weight, scale = module["weight"], module.get("weights_scaling_factor")
        out, inputs = _up(weight.shape[0], _COLS), _up(weight.shape[1], _STEP)
        weight = functional.pad(weight, [0, inputs - weight.shape[1], 0, out - weight.shape[0]])
        as_bytes = scale is not None and self.activations == "int8"
        if scale is None:
            self._add(f"{name}.weight", "BF16", _bf16_words(weight))
            self.linears[name] = LinearShape("bf16", out, inputs)
        else:
            form = "int8" if "bytes" in module else "int4"
            words = _int8_words(weight) if form == "int8" else _int4_words(weight)
            self._add(f"{name}.weight", "U8", words)
            narrow = torch.equal(scale.bfloat16().float(), scale.float())
            self._add(f"{name}.scales", "BF16" if narrow else "F32", _in_blocks(scale, out))
            if as_bytes:
                counts = weight.view(out, -1, _PART).sum(-1, dtype=torch.int16)
                self._add(f"{name}.counts", "I16", _in_blocks(counts, out))
            group = module["weight"].shape[1] // scale.shape[1]
            self.linears[name] = LinearShape(form, out, inputs, group, as_bytes, narrow)
        if "zero" in module:
            self._add(f"{name}.zeros", "F32", _in_blocks(module["zero"], out))
        if "bias" in module:
            self._add(f"{name}.bias", "F32", _padded(module["bias"], out))
        if "prequant_scaling_factor" in module:
            self._add(f"{name}.factor", "F32", _padded(module["prequant_scaling_factor"], inputs))


def _network(
    config: ModelConfig,
    max_seq_len: int,
    activations: str,
    linears: dict[str, LinearShape],
    kept: list[float],
) -> Network:
    traits, ropes = traits_of(config), all_frequencies(config, max_seq_len)
    return Network(
        layout=LAYOUT,
        activations=activations,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_size,
        rotary=config.rotary_dim,
        inner=_up(config.intermediate_size, _LANES),
        vocab=config.vocab_size,
        gelu=traits.gelu,
        norm_sublayers=traits.norm_sublayers,
        epsilon=config.norm_epsilon,
        embedding_scale=traits.embedding_scale,
        logits_cap=traits.logits_soft_cap or 0.0,
        rules=[
            Rule(rule.scale, rule.soft_cap or 0.0, rule.window or 0, local, scale)
            for rule, local, scale in zip(traits.rules, traits.local_rope, kept, strict=True)
        ],
        ropes=[_rope(found) for found in (ropes.everywhere, ropes.local, ropes.short)],
        pretrained=ropes.pretrained,
        linears=linears,
        kept=_KEPT[config.quantization.kv_cache_quant_algo],
    )


def _rope(found: Frequencies | None) -> RopeFrequencies | None:
    return None if found is None else RopeFrequencies(found.inverse.tolist(), found.magnitude)


# ---- what a linear's tensors are ----


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
    pad = _up(len(first), _LANES) - len(first)
    padding = [0, 0] * (first.ndim - 1) + [0, pad]
    parts = [functional.pad(part, padding).unflatten(0, (-1, _LANES)) for part in (first, second)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _rounded(weight: Tensor) -> dict[str, Tensor]:
    """A weight to the nearest of 255 even steps for each output and group of 64 inputs."""
    padded = functional.pad(weight.float(), [0, -weight.shape[1] % _STEP])
    groups = padded.unflatten(1, (-1, _STEP))
    scale = (groups.abs().amax(-1) / 127).bfloat16()
    steps = (groups / scale.float().clamp(min=1e-30).unsqueeze(-1)).round_().clamp_(-127, 127)
    whole = steps.flatten(1).to(torch.int8)
    return {"weight": whole, "weights_scaling_factor": scale, "bytes": scale}


# ---- how they stand in the file ----


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(values: Tensor, size: int) -> Tensor:
    return functional.pad(values.float(), [0, size - len(values)])


def _in_blocks(values: Tensor, out: int) -> Tensor:
    """[rows, n] -> [out / 32, n, 32], rows padded with zeros."""
    blocks: Tensor = functional.pad(values, [0, 0, 0, out - len(values)]).unflatten(0, (-1, _COLS))
    return blocks.transpose(1, 2)


def _words(values: Tensor, each: int) -> Tensor:
    """[out, n] -> [out / 32, n / each, 2, 16, each]: of every output `each` that follow."""
    parts: Tensor = values.unflatten(1, (-1, each)).unflatten(0, (-1, 2, _LANES))
    return parts.permute(0, 3, 1, 2, 4)


def _int4_words(q: Tensor) -> Tensor:
    nibbles = (q + 8).view(torch.uint8).unflatten(1, (-1, 2, 4))
    return _words((nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1), 4)


def _int8_words(q: Tensor) -> Tensor:
    return _words(q.view(torch.uint8) ^ 128, 4)


def _bf16_words(weight: Tensor) -> Tensor:
    ordered = weight.to(torch.bfloat16).unflatten(1, (-1, 8))[:, :, _PAIRS].flatten(1)
    return _words(ordered, 2)


_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I16": torch.int16, "U8": torch.uint8}

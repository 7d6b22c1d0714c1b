"""A quantised Hugging Face checkpoint as a runtime computes with it: its weights as they are read
back, and what enters each linear rounded as the form's kernel does. float32, layer by layer.

Source: the forms' schemes, docs/hf_export.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.forms.block_floats import MX_BLOCK, dequantize_blocks
from enginehouse.build.forms.block_quantization import nvfp4_round_trip, quantize_mxfp8
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.quantize.reference import ReferenceModel, fast_products
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.safetensors_file import read_safetensors_header
from enginehouse.runtime.checkpoint.packing import FP8_MAX, to_fp8
from enginehouse.runtime.torch.decoder import PREFIX, DecoderLayer, causal_attention
from enginehouse.runtime.torch.linear import Linear

Windows = Mapping[str, list[Tensor]]
Entering = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """Over all windows of each text: [nll in nats, tokens], and the mean KL of all, in nats."""

    nll: dict[str, tuple[float, int]]
    mean_kl: float
    num_bytes: int


class _Layer(DecoderLayer):
    entering: Mapping[str, Entering] = {}

    def _run(self, name: str, linear: Linear, x: Tensor) -> Tensor:
        entering = self.entering.get(name)
        return super()._run(name, linear, x if entering is None else entering(x))


def static_fp8(scale: float) -> Entering:
    return lambda x: to_fp8(x / scale).float().mul_(scale)


def dynamic_fp8(x: Tensor, group: int) -> Tensor:
    """A scale for each token and `group` inputs, its largest magnitude / 448."""
    width = x.shape[-1]
    groups = functional.pad(x, (0, -width % group)).unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_(min=1e-12)
    return to_fp8(groups / scale).float().mul_(scale).flatten(-2)[..., :width]


def mxfp8_round_trip(x: Tensor) -> Tensor:
    q, scale, _ = quantize_mxfp8(x)
    return dequantize_blocks(q, scale, MX_BLOCK)


def entering_of(folder: Path, module: str) -> Entering | None:
    """How the kernel rounds what enters a linear; module: its name, or of one of its parts."""
    said = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if said.get("quant_method") == "fp8":
        return lambda x: dynamic_fp8(x, 128)
    if said.get("quant_method") == "compressed-tensors":
        return _entering_compressed(folder, module, said)
    own = said.get("quantized_layers", {}).get(module, {})
    algo = own.get("quant_algo") or said.get("quant_algo")
    if algo in ("FP8", "NVFP4"):
        number = float(_stored(folder, f"{module}.input_scale"))
        return static_fp8(number) if algo == "FP8" else lambda x: nvfp4_round_trip(x, number)
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return lambda x: dynamic_fp8(x, x.shape[-1])
    if algo == "MXFP8":
        return mxfp8_round_trip
    if algo in ("W4A16_AWQ", "W4A16_NVFP4") or module in said.get("ignore", ()):
        return None
    raise ValueError(f"quant_algo={algo}: it is not known here how what enters is rounded")


def _entering_compressed(folder: Path, module: str, said: Mapping[str, Any]) -> Entering | None:
    """The same of compressed-tensors' schemes."""
    if module in said.get("ignore", ()):
        return None
    groups = list(said["config_groups"].values())
    own = [group for group in groups if module in group["targets"]]
    (group,) = own or [group for group in groups if "Linear" in group["targets"]]
    inputs = group.get("input_activations")
    if inputs is None:
        return None
    scheme = inputs["type"], inputs["num_bits"], inputs["strategy"]
    if scheme == ("float", 8, "token"):
        return lambda x: dynamic_fp8(x, x.shape[-1])
    if scheme == ("float", 8, "tensor") and not inputs["dynamic"]:
        return static_fp8(float(_stored(folder, f"{module}.input_scale")))
    if scheme == ("float", 8, "group"):
        size = int(inputs["group_size"])
        return mxfp8_round_trip if size == MX_BLOCK[1] else lambda x: dynamic_fp8(x, size)
    if scheme == ("float", 4, "tensor_group"):
        number = 1 / float(_stored(folder, f"{module}.input_global_scale"))
        return lambda x: nvfp4_round_trip(x, number)
    raise ValueError(f"{scheme}: it is not known here how what enters is rounded")


def _stored(folder: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def states_of(source: SourceCheckpoint, windows: Windows, folder: Path | None) -> list[Tensor]:
    """What stands before the last norm, of each window; folder: of a checkpoint whose linears round
    what enters them.
    """
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    sequences = [ids for part in windows.values() for ids in part]
    hidden = reference.embedded(sequences)
    rotary = reference.rotary(max(map(len, sequences)))
    rows = {row.target: row for row in stage_rows(reference.config, 0)}
    for index in range(reference.config.num_hidden_layers):
        prefix = PREFIX.format(index)
        layer = _Layer(reference.config, reference.tensors(prefix), torch.float32)
        if folder is not None:
            entering = {}
            for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
                row = rows.get(f"{prefix}{name}.weight")
                if row is not None:
                    module = row.sources[0].removesuffix(".weight")
                    how = entering_of(folder, module)
                    entering.update({name: how} if how is not None else {})
            layer.entering = entering
        rope = reference.traits.ropes[index]
        for i, states in enumerate(hidden):
            angles = None if rope is None else rotary.at(torch.arange(len(states)))[rope]
            hidden[i] = layer(index, states, angles, causal_attention)
    return hidden


def logits_of(source: SourceCheckpoint, hidden: list[Tensor]) -> Iterator[Tensor]:
    """Of each window, [tokens, vocab]: one at a time, as they are large."""
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    for states in hidden:
        yield reference.logits([states])[0]


@torch.inference_mode()
def measure(
    folder: Path, original: SourceCheckpoint, truth: list[Tensor], windows: Windows
) -> Loss:
    """What a checkpoint loses; truth: `states_of` the original, whose KL is taken."""
    quantised = json.loads((folder / "config.json").read_text()).get("quantization_config")
    source = resolve_source(str(folder), folder, dequantize=bool(quantised))
    with fast_products():
        hidden = states_of(source, windows, folder if quantised else None)
        pairs = zip(logits_of(original, truth), logits_of(source, hidden), strict=True)
        nll: dict[str, tuple[float, int]] = {}
        kl, count = 0.0, 0
        for name, part in windows.items():
            total = 0.0
            for ids in part:
                wanted, found = (logits.log_softmax(-1) for logits in next(pairs))
                kl += float((wanted.exp() * (wanted - found)).sum(-1).sum())
                count += len(ids)
                total += float(functional.nll_loss(found[:-1], ids[1:], reduction="sum"))
            nll[name] = (total, sum(len(ids) - 1 for ids in part))
    return Loss(nll, kl / count, _linear_bytes(folder))


def _linear_bytes(folder: Path) -> int:
    """Of the decoder's linears with all their scales: what the forms differ in."""
    header: dict[str, Any] = dict(read_safetensors_header(folder / "model.safetensors"))
    total = 0
    for name, item in header.items():
        if ".layers." in name and "norm" not in name:
            size = item.dtype.itemsize
            for length in item.shape:
                size *= length
            total += size
    return total

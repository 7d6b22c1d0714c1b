"""A linear's checkpoint tensors -> what the kernels multiply: one form of weights and their scales.

The arithmetic is that of `runtime/torch/linear.py`; scales of the whole input or output go to where
they cost nothing. Knows tensors' names, not how they stand in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.cpu.kernel_sizes import LANES, STEP
from enginehouse.runtime.errors import EngineError


class LinearWeights(NamedTuple):
    """form, input: as of `packed_file.LinearShape`.

    weight: floating [out, in]; int8 [out, in] of 4 or 8 bits; uint8 [out, in], the bytes of e4m3.
    scale, zero: [out, groups], what q is multiplied by and what is added after that; bias: [out];
    factor: [in], what the input is multiplied by. Floating, None for none.
    """

    form: str
    input: str
    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None
    factor: Tensor | None = None


def linear_of(module: Mapping[str, Tensor], activations: str, fine: bool = False) -> LinearWeights:
    """activations: of `support.ACTIVATIONS`, for weights that do not settle it themselves. fine:
    where they are bytes, each scale is of fewer inputs.

    Raises EngineError for tensors that are no form.
    """
    weight, bias = module["weight"], module.get("bias")
    if weight.dtype == torch.float8_e4m3fn:
        return _of_e4m3(module, weight.view(torch.uint8), bias)
    if weight.dtype != torch.int8:
        return LinearWeights("bf16", "bf16", weight, bias=bias)
    input_of = {"int8": "fine_bytes" if fine else "bytes", "bf16": "bf16"}[activations]
    if (scale := module.get("per_channel_scale")) is not None:  # or one for each rank's inputs
        return LinearWeights("int8", input_of, weight, scale.view(len(weight), -1), bias=bias)
    if (scale := module.get("weights_scaling_factor")) is None:
        raise EngineError(f"a linear has {', '.join(sorted(module))}, and no scale; build it again")
    q, factor = unpack_int4(weight), module.get("prequant_scaling_factor")
    if "weights_scaling_factor_2" in module:
        return _of_w4a8(module, q, bias)
    zero = module["zero"].T if "zero" in module else None
    return LinearWeights("int4", input_of, q, scale, zero, bias, factor)


def _of_e4m3(module: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> LinearWeights:
    if (scale := module.get("per_channel_scale")) is not None:
        return LinearWeights("e4m3", "e4m3_by_row", weight, scale.float().unsqueeze(1), bias=bias)
    activation = float(module["activation_scaling_factor"])
    both = activation * float(module["weights_scaling_factor"])
    factor = torch.full((weight.shape[1],), 1.0 / activation)
    return LinearWeights(
        "e4m3", "e4m3", weight, torch.full((len(weight), 1), both), bias=bias, factor=factor
    )


def _of_w4a8(module: Mapping[str, Tensor], q: Tensor, bias: Tensor | None) -> LinearWeights:
    """The groups' scales are rounded to float16 after the second one divided them."""
    second, activation = module["weights_scaling_factor_2"], module["activation_scaling_factor"]
    prequant = module["prequant_scaling_factor"]
    factor = (prequant.float() / activation).to(prequant.dtype)
    scale = (module["weights_scaling_factor"].float() / second).half().float()
    alpha = float(activation) * float(second)
    return LinearWeights("int4", "e4m3", q, scale * alpha, bias=bias, factor=factor)


def gated(fc: LinearWeights, gate: LinearWeights) -> dict[str, LinearWeights]:
    """fc, which is activated, and gate as one linear whose outputs take turns of 16; as two where
    they differ in form or in what enters them.
    """
    if not _joinable(fc, gate):
        return {"fc_gate": fc, "gate": gate}
    weight = _in_turns(fc.weight, gate.weight)
    scale, zero, bias = (
        None if one is None or other is None else _in_turns(one, other)
        for one, other in ((fc.scale, gate.scale), (fc.zero, gate.zero), (fc.bias, gate.bias))
    )
    return {"fc_gate": fc._replace(weight=weight, scale=scale, zero=zero, bias=bias)}


def halves(linear: LinearWeights) -> list[LinearWeights]:
    """The first and the second half of a linear's outputs."""

    def half(values: Tensor | None, i: int) -> Tensor | None:
        return None if values is None else values.chunk(2)[i]

    return [
        linear._replace(
            weight=linear.weight.chunk(2)[i],
            scale=half(linear.scale, i),
            zero=half(linear.zero, i),
            bias=half(linear.bias, i),
        )
        for i in (0, 1)
    ]


def rounded(weight: Tensor) -> LinearWeights:
    """A weight to the nearest of 255 even steps for each output and group of 64 inputs."""
    padded = functional.pad(weight.float(), [0, -weight.shape[1] % STEP])
    groups = padded.unflatten(1, (-1, STEP))
    scale = (groups.abs().amax(-1) / 127).bfloat16()
    steps = (groups / scale.float().clamp(min=1e-30).unsqueeze(-1)).round_().clamp_(-127, 127)
    return LinearWeights("int8", "fine_bytes", steps.flatten(1).to(torch.int8), scale)


def _joinable(first: LinearWeights, other: LinearWeights) -> bool:
    same = (first.form, first.input) == (other.form, other.input)
    same = same and _alike(first.scale, other.scale) and _alike(first.zero, other.zero)
    same = same and _alike(first.bias, other.bias) and _alike(first.factor, other.factor)
    return same and (
        first.factor is None or other.factor is None or torch.equal(first.factor, other.factor)
    )


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and one.shape == other.shape)


def _in_turns(first: Tensor, second: Tensor) -> Tensor:
    """[out, ...] twice -> [2 * out, ...] in turns of 16, out padded with zeros to a multiple."""
    padding = [0, 0] * (first.ndim - 1) + [0, -len(first) % LANES]
    parts = [functional.pad(part, padding).unflatten(0, (-1, LANES)) for part in (first, second)]
    return torch.stack(parts, dim=1).flatten(0, 2)

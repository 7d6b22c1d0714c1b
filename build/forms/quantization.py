"""FP8 E4M3 and INT4 groups: choose scales and round. Packing and inverses are the runtime's.

Knows single tensors only; which tensors share a scale is `convert/conversion.py`'s business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.runtime.checkpoint.packing import FP8_MAX, to_fp8
from enginehouse.runtime.errors import QuantizationError

INT4_MAX = 7
# Of a group's largest magnitude: what an INT4 scale may leave out for finer steps elsewhere.
INT4_SHRINKS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)
# Of an FP8 row's largest magnitude, up to nearly twice it: its steps double at each power of two,
# and rows differ in where it is best that their weights lie between two.
FP8_STRETCHES = (1.0, 1.12, 1.25, 1.4, 1.6)
_EXPONENT, _LEAST_E4M3 = 0x7F800000, 2.0**-9  # float32's bits of it; the smallest number
_ROWS_AT_ONCE = 1 << 22  # elements held in float32 at a time
_INT4_AT_ONCE = 1 << 18  # fewer, as each is rounded several times and stays in the cache


class Int4Weight(NamedTuple):
    """q: int8 [out, in] in [-8, 7]; scale: [out, in // group_size]; weight is about q * scale."""

    q: Tensor
    scale: Tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """QuantizationError when a tensor holds NaN or infinity: no scale could be chosen."""
    if tensor.dtype == torch.float8_e4m3fn:  # its largest bits, but for the sign, are NaN's
        tensor = (tensor.view(torch.uint8) & 0x7F).amax().view(tensor.dtype).float()
    if not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise QuantizationError(
            f"{name} holds NaN or infinite values; the source checkpoint is damaged: fetch it again"
        )


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor rounded to `dtype`; QuantizationError where that has no such numbers."""
    rounded = tensor.to(dtype)
    if rounded is not tensor and any(torch.isinf(end) for end in torch.aminmax(rounded)):
        word = str(dtype).removeprefix("torch.")
        raise QuantizationError(
            f"{name} holds {float(tensor.abs().amax()):g}, beyond the range of {word}; choose "
            "another dtype, such as bfloat16"
        )
    return rounded


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales as they will be read back from `dtype`; 1 where nothing is left of them."""
    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def quantize_int4(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> Int4Weight:
    """Round `weight` to signed 4-bit integers with one scale per group of inputs.

    weight: [out_features, in_features], floating; group_size divides in_features.
    Returns q: int8 in [-8, 7], same shape, and scale: scale_dtype,
    [out_features, in_features // group_size]: of INT4_SHRINKS times the group's largest
    magnitude / 7, the one with the least sum of cubed errors, so the largest weights may be
    clipped. Cubes, as large weights matter more than their number says (docs/quality.md).
    Rounding uses the scale as stored. Works in bounded memory: a few MiB beside its result.

    Raises QuantizationError when group_size does not divide in_features.
    Source: TensorRT-LLM checkpoint format, W4A16_AWQ; AWQ (Lin et al., 2023), section 3.
    """
    out_features, in_features = weight.shape
    if in_features % group_size:
        raise QuantizationError(
            f"in_features={in_features} cannot be cut into groups of {group_size}; "
            "choose a group size that divides it"
        )
    q = torch.empty(out_features, in_features, dtype=torch.int8)
    scale = torch.empty(out_features, in_features // group_size, dtype=scale_dtype)
    step = max(1, _INT4_AT_ONCE // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        groups = weight[rows].float().view(-1, scale.shape[1], group_size)  # [rows, groups, g]
        largest = groups.abs().amax(dim=-1, keepdim=True) / INT4_MAX
        best = stored_scale(largest, scale_dtype)
        best_error = torch.full_like(best, float("inf"))
        for shrink in INT4_SHRINKS:
            divisor = stored_scale(largest * shrink, scale_dtype)
            error = (groups / divisor).round_().clamp_(-8, 7).mul_(divisor).sub_(groups).abs_()
            error = error.pow_(3).sum(-1, keepdim=True)
            better = error < best_error
            best, best_error = (
                torch.where(better, new, old) for new, old in ((divisor, best), (error, best_error))
            )
        q[rows] = (groups / best).round_().clamp_(-8, 7).flatten(1).to(torch.int8)
        scale[rows] = best.squeeze(-1).to(scale_dtype)
    return Int4Weight(q, scale)


def fp8_scale(amax: float) -> float:
    """The multiplier that maps e4m3's largest value to `amax`; 1.0 for a tensor of zeros."""
    return amax / FP8_MAX if amax > 0 else 1.0


def round_e4m3(values: Tensor) -> Tensor:
    """`values`, finite float32, made those of e4m3 in place: as `to_fp8` and back does, in a third
    of the time.
    """
    values.clamp_(-FP8_MAX, FP8_MAX)
    power = (values.view(torch.int32) & _EXPONENT).view(torch.float32)  # of two, not above
    step = power.div_(8).clamp_(min=_LEAST_E4M3)
    return values.div_(step).round_().mul_(step)


class RowwiseFp8Weight(NamedTuple):
    """q: float8_e4m3fn [out, in]; scale: float32 [out]; weight is about q * scale."""

    q: Tensor
    scale: Tensor


def quantize_fp8_rowwise(weight: Tensor) -> RowwiseFp8Weight:
    """A scale for each output channel: of FP8_STRETCHES times its largest magnitude / 448, the one
    with the least sum of squared errors; bounded memory.

    weight: [out_features, in_features], floating; a row of zeros gets the scale 1.
    """
    scale = torch.empty(len(weight))
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    step = max(1, _INT4_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].float()
        largest = part.abs().amax(dim=1, keepdim=True) / FP8_MAX
        largest = torch.where(largest > 0, largest, 1.0)
        best = best_error = torch.full_like(largest, float("inf"))
        for stretch in FP8_STRETCHES:
            divisor = largest * stretch
            error = round_e4m3(part / divisor).mul_(divisor).sub_(part).square_()
            error = error.sum(-1, keepdim=True)
            better = error < best_error
            best = torch.where(better, divisor, best)
            best_error = torch.where(better, error, best_error)
        q[rows] = to_fp8(part / best)
        scale[rows] = best.squeeze(1)
    return RowwiseFp8Weight(q, scale)


def quantize_fp8(weight: Tensor, scale: float) -> Tensor:
    """float8_e4m3fn of weight / scale, rounded to nearest even, saturated; bounded memory.

    weight: [out_features, in_features]. Source: FP8 Formats (Micikevicius et al., 2022).
    """
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        result[rows] = to_fp8(weight[rows].float() / scale)
    return result

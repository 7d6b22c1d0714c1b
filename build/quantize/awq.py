"""INT4 with regard for what flows through: input scales, clipped groups, compensated rounding.

One linear (or several that share their input) at a time, from its weights and the second moment
of its inputs. Knows no layer and no file: `layerwise_awq.py` walks the model.
Source: AWQ (Lin et al., 2023), sections 3.2 and 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.forms.quantization import INT4_MAX, Int4Weight, stored_scale
from enginehouse.build.quantize.compensation import (
    InputMoments,
    mean_of_live,
    round_compensated,
)

ALPHAS = tuple(step / 10 for step in range(10))  # 0: no input scale at all
SHRINKS = tuple(1 - step / 20 for step in range(9))  # of a group's largest magnitude, to 0.6
_SEARCH_ROWS = 256
_FIT_COLUMNS = 1024


class AwqLinear(NamedTuple):
    """q and scale are of weight / prequant; prequant [in], in the model's dtype, multiplies x."""

    weight: Int4Weight
    prequant: Tensor

    def dequantized(self) -> Tensor:
        """float32 [out, in]: what the linear multiplies x with, all factors applied."""
        q, scale = self.weight
        groups = q.float().view(*scale.shape, -1) * scale.float().unsqueeze(-1)
        return groups.flatten(1) * self.prequant.float()


def quantize_awq(
    weight: Tensor, moments: InputMoments, group_size: int, scale_dtype: torch.dtype
) -> AwqLinear:
    """Make up for earlier layers, search the input scales, then the groups' scales, round with
    compensation, and fit the input scales to what was rounded.

    weight: float32 [out_features, in_features]; linears that share an input are stacked on dim 0.
    Each step minimises the squared error of the linear's outputs on the calibration inputs.
    Takes the moments' drift. Memory: three matrices [in, in], and four copies of `weight`.
    """
    missing = weight @ moments.take_drift()
    with moments.damped() as second:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
        weight = (missing @ inverse).add_(weight)
        del missing
        importance = 1 / inverse.diagonal()  # of an error that the other channels make up for
        prequant = search_prequant(weight, moments.mean, importance, group_size, scale_dtype)
        scales = [
            search_scale(rows, prequant, importance, group_size, scale_dtype)
            for rows in weight.split(_SEARCH_ROWS)
        ]
        scale = torch.cat(scales)
        order = torch.argsort(inverse.diagonal())  # what the rest can make up for least comes first
        inverse = inverse[order[:, None], order]
        upper = torch.linalg.cholesky(inverse, upper=True)
        del inverse
        q = round_int4(weight, scale, prequant, order, upper)
        del upper
        fitted = fit_prequant(weight, Int4Weight(q, scale), prequant, second)
    return AwqLinear(Int4Weight(q, scale), fitted)


def search_prequant(
    weight: Tensor, mean: Tensor, importance: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The factors [in] on x, among mean ** -alpha, that lose least by plain rounding.

    mean: of each channel's magnitude, [in]; importance: what a squared error of a channel's
    weights costs, [in]. A channel that carries large inputs gets large weights, and so finer
    steps; one that nothing enters keeps 1. An even sample of the rows decides.
    """
    live = mean > 0
    mean = mean.clamp(min=1e-5)
    weight = weight[:: -(-len(weight) // _SEARCH_ROWS)]
    best, best_error = torch.ones_like(mean, dtype=dtype), float("inf")
    for alpha in ALPHAS:
        powers = mean**alpha
        used = powers[live] if bool(live.any()) else powers
        powers = torch.where(live, powers / (used.amax() * used.amin()).sqrt(), 1.0)
        prequant = (1 / powers.clamp(1e-4, 1e4)).to(dtype)
        factor = prequant.float()
        groups = (weight / factor).view(len(weight), -1, group_size)
        scale = stored_scale(groups.abs().amax(dim=-1) / INT4_MAX, dtype).unsqueeze(-1)
        rounded = (groups / scale).round_().clamp_(-8, 7).mul_(scale)
        difference = (groups - rounded).flatten(1).mul_(factor)
        error = float((difference.square_() @ importance).sum())
        if error < best_error:
            best, best_error = prequant, error
    return best


def search_scale(
    weight: Tensor, prequant: Tensor, importance: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The scale of each group of weight / prequant, [out, groups] in `dtype`: clipped where that
    loses less. importance: what a squared error of a channel's weights costs, [in].
    """
    factor = prequant.float()
    groups = (weight / factor).view(len(weight), -1, group_size)
    costs = (importance * factor * factor).view(-1, group_size)
    largest = groups.abs().amax(dim=-1) / INT4_MAX  # [out, groups]
    best = stored_scale(largest, dtype)
    best_error = torch.full_like(best, float("inf"))
    for shrink in SHRINKS:
        scale = stored_scale(largest * shrink, dtype)
        steps = scale.unsqueeze(-1)
        squares = (groups / steps).round_().clamp_(-8, 7).mul_(steps).sub_(groups).square_()
        error = squares.mul_(costs).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best.to(dtype)


def round_int4(
    weight: Tensor, scale: Tensor, prequant: Tensor, order: Tensor, upper: Tensor
) -> Tensor:
    """int8 [out, in] in [-8, 7], rounded with compensation; weight is about q * scale * prequant.

    order, upper: as round_compensated takes them.
    """
    steps = stored_scale(scale.float(), scale.dtype)
    steps = steps.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1) * prequant.float()
    q = round_compensated(weight, steps, order, upper, lambda x: x.round_().clamp_(-8, 7))
    return q.to(torch.int8)


def fit_prequant(weight: Tensor, rounded: Int4Weight, prequant: Tensor, second: Tensor) -> Tensor:
    """The factors [in], in prequant's dtype, with which `rounded` loses least: least squares.

    weight [out, in] is what rounded * prequant should be.
    """
    whole = AwqLinear(rounded, torch.ones_like(prequant)).dequantized()
    system = (whole.T @ whole).mul_(second)
    blocks = zip(whole.split(_FIT_COLUMNS, 1), second.split(_FIT_COLUMNS), strict=True)
    wanted = torch.cat([(columns.T @ weight).mul_(rows).sum(1) for columns, rows in blocks])
    # a channel of zeros keeps its factor
    ridge = 1e-3 * mean_of_live(system.diagonal()) + 1e-12
    system.diagonal().add_(ridge)
    factor: Tensor = torch.linalg.solve(system, wanted + ridge * prequant.float())
    return factor.to(prequant.dtype)

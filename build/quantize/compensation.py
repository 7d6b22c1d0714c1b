"""Rounding in which the columns of a weight make up for each other, given what flows through.

Knows no format: the steps, and what may stand in them, are the caller's.
Source: GPTQ (Frantar et al., 2023), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Added to the second moment's diagonal, as a share of its mean: calibration has few tokens for so
# many channels, and what it says of their correlations holds for other text only in part.
DAMPING = 0.3
_BLOCK = 64  # columns rounded before the rest hears of their errors
_ROWS = 4096  # rounded at a time

Rounding = Callable[[Tensor], object]  # makes float32 values those of the format, in place


class InputMoments:
    """What calibration keeps of a linear's inputs: sums, never the inputs themselves.

    second: float32 [in, in], the sum of x x^T; drift: float32 [in, in], that of (truth - x) x^T,
    where truth is the input in the unquantised model; mean: float32 [in], the mean magnitude of
    each channel.
    """

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self.second = torch.zeros(in_features, in_features, device=device)
        self.drift = torch.zeros(in_features, in_features, device=device)
        self._sum = torch.zeros(in_features, device=device)
        self._count = 0

    def add(self, x: Tensor, truth: Tensor | None = None) -> None:
        """x, truth: [tokens, in_features]; without truth, x is what it should be."""
        x = x.float()
        self.second.addmm_(x.T, x)
        if truth is not None:
            self.drift.addmm_((truth - x).T, x)
        self._sum += x.abs().sum(0)
        self._count += len(x)

    @property
    def mean(self) -> Tensor:
        return self._sum / max(1, self._count)

    def spread(self, order: Tensor) -> InputMoments:
        """Those of a wider input, which these are moved to; order: as `spread` takes it."""
        wider = InputMoments(0)
        wider.second = spread(spread(self.take_second(), order).T, order).T
        wider.drift = spread(spread(self.take_drift(), order).T, order).T
        wider._sum, wider._count = spread(self._sum, order), self._count
        return wider

    def take_second(self) -> Tensor:
        """`second`, which is not kept here any longer: it is the largest of all there is."""
        taken, self.second = self.second, self.second.new_empty(0, 0)
        return taken

    def take_drift(self) -> Tensor:
        """`drift`, likewise."""
        taken, self.drift = self.drift, self.drift.new_empty(0, 0)
        return taken

    @contextmanager
    def damped(self) -> Iterator[Tensor]:
        """`second` as errors are weighed with it, [in, in], positive definite; in its own memory,
        and afterwards as it was.
        """
        diagonal = self.second.diagonal()
        before = diagonal.clone()
        diagonal.add_(DAMPING * mean_of_live(before) + 1e-8)
        try:
            yield self.second
        finally:
            diagonal.copy_(before)


def spread(values: Tensor, order: Tensor) -> Tensor:
    """values [..., in] -> [..., wider]: where each came from, a negative place being one that
    nothing enters.
    """
    order = order.to(values.device)
    return values.index_select(-1, order.clamp(min=0)).mul_(order >= 0)


def mean_of_live(squares: Tensor) -> float:
    """The mean over the channels that something enters, [in]: others, which padding has, do not
    count. 0 where there are none.
    """
    live = squares[squares > 0]
    return float(live.mean()) if len(live) else 0.0


def aim_at_truth(weight: Tensor, moments: InputMoments, share: float) -> Tensor:
    """The weight [out, in] moved by a share of what takes its outputs on the inputs there are to
    those on the inputs there should be, in least squares. Takes the moments' drift. Memory: two
    matrices [in, in], and one copy of weight.

    Source: GPTAQ (Li et al., 2025).
    """
    missing = (weight @ moments.take_drift()).T
    with moments.damped() as second:
        lower = torch.linalg.cholesky(second)
    torch.linalg.solve_triangular(lower, missing, upper=False, out=missing)
    torch.linalg.solve_triangular(lower.mT, missing, upper=True, out=missing)
    return missing.T.mul_(share).add_(weight)


def rounding_order(moments: InputMoments, damping: float) -> tuple[Tensor, Tensor]:
    """The order [in] in which columns are rounded, what matters most first, and of the second
    moment in that order the inverse's Cholesky factor [in, in]. Takes the moments' second; to its
    diagonal a share `damping` of each channel's own is added. Memory: two matrices [in, in].
    """
    second = moments.take_second()
    mean = float(second.diagonal().mean())
    second.diagonal().mul_(1 + damping).add_(1e-3 * mean + 1e-8)
    order = torch.argsort(second.diagonal(), descending=True)
    # The last come first here, so that the factor's inverse is that of the inverse, turned round.
    turned = order.flip(0)
    second = second[turned[:, None], turned]
    lower = torch.linalg.cholesky(second)
    del second
    upper = torch.eye(len(lower), device=lower.device)
    torch.linalg.solve_triangular(lower, upper, upper=False, out=upper)
    return order, upper.flip(0, 1)


def round_compensated(
    weight: Tensor, steps: Tensor, order: Tensor, upper: Tensor, nearest: Rounding
) -> Tensor:
    """q, float32 [out, in], so that q * steps is about weight: columns are rounded in turn, by
    `nearest`, and the rest make up for each.

    weight: float32 [out, in]; steps: [out, in], or [1, in] where the rows share theirs; they stand
    fixed, so any order [in] of the columns will do. upper: [in, in], of the second moment in that
    order the inverse's Cholesky factor. Rows know nothing of each other: some go at a time.
    Memory: the result, and four copies of _ROWS rows.
    Source: GPTQ, section 3.3, with static groups.
    """
    result = torch.empty_like(weight)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        its_own = steps if len(steps) == 1 else steps[rows]
        result[rows] = _round_rows(weight[rows], its_own, order, upper, nearest)
    return result


def _round_rows(
    weight: Tensor, steps: Tensor, order: Tensor, upper: Tensor, nearest: Rounding
) -> Tensor:
    in_features = weight.shape[1]
    steps = steps[:, order].T.contiguous()
    rest = weight.T[order].contiguous()  # [in, out]: a column of the weight is a row here
    q = torch.empty_like(rest)
    for start in range(0, in_features, _BLOCK):
        end = min(start + _BLOCK, in_features)
        errors = torch.empty_like(rest[start:end])
        with _one_thread():
            _round_block(
                rest[start:end],
                steps[start:end],
                upper[start:end, start:end],
                nearest,
                q[start:end],
                errors,
            )
        rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    rest[order] = q
    return rest.T


def _round_block(
    rest: Tensor, steps: Tensor, upper: Tensor, nearest: Rounding, q: Tensor, errors: Tensor
) -> None:
    """Round the rows of `rest` [block, out] in turn into q; what each leaves, into errors."""
    for i in range(len(rest)):
        nearest(torch.div(rest[i], steps[i], out=q[i]))
        torch.addcmul(rest[i], q[i], steps[i], value=-1, out=errors[i])
        errors[i].div_(upper[i, i])
        if i + 1 < len(rest):
            rest[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small steps: a barrier after each, with a busy neighbour, costs more than a
    second thread gives.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)

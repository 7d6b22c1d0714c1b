"""Divergence from a few log probabilities: never more than the whole, and all of it with all."""

from __future__ import annotations

import math

import pytest
import torch

from enginehouse.regress.numerics.divergence import answer_kl, first_parting, kl_of_tops


def tops(logits: torch.Tensor, count: int) -> dict[int, float]:
    values, ids = logits.log_softmax(-1).topk(count)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_it_is_torchs_with_all_tokens_and_never_more_with_some(spread: float) -> None:
    torch.manual_seed(3)
    p = torch.randn(50, dtype=torch.float64) * 3
    q = p + spread * torch.randn(50, dtype=torch.float64)
    true = float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
    assert kl_of_tops(tops(p, 50), tops(q, 50)) == pytest.approx(true, rel=1e-6)
    for count in (1, 4, 20):
        assert 0 <= kl_of_tops(tops(p, count), tops(q, count)) <= true * (1 + 1e-9)


def test_equal_sides_are_0_apart_and_sides_that_share_nothing_tell_nothing() -> None:
    one = {"a": math.log(0.6), "b": math.log(0.3)}
    assert kl_of_tops(one, dict(one)) == 0
    assert kl_of_tops(one, {"c": math.log(0.9)}) == 0  # no token of it is known on both sides


def test_answers_are_compared_as_far_as_both_read_the_same() -> None:
    old, new = ["a", "b", "c"], ["a", "x", "c"]
    top = [{"a": -0.1}, {"b": -0.5, "x": -1.5}, {"c": -0.1}]
    assert first_parting(old, new, top) == (1, 1.0)
    assert len(answer_kl(old, new, top, top)) == 2
    assert first_parting(old, old, top) == (None, None)
    assert first_parting(old, old[:2], top) == (2, None)
    assert first_parting(old, ["z"], top) == (0, None)  # what z had is not told

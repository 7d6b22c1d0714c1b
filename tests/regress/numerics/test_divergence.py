"""Divergence from a few log probabilities: never more than the whole, and all of it with all."""

from __future__ import annotations

import math

import pytest
import torch

from enginehouse.regress.numerics.divergence import (
    Parting,
    answer_kl,
    first_parting,
    kl_of_tops,
)


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
    assert first_parting(old, new, top) == Parting(1, 1.0)
    assert len(answer_kl(old, new, top, top)) == 2
    assert first_parting(old, old, top) == Parting(None)
    assert first_parting(old, old[:2], top) == Parting(2)
    assert first_parting(old, ["z"], top) == Parting(0)  # what z had is not told
    known = [{"a": -0.1, "b": -3.0}]
    assert first_parting(["a"], ["z"], known) == Parting(0, None, pytest.approx(2.9))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_what_is_no_distribution_is_as_far_as_can_be(value: float) -> None:
    good = {1: -0.1, 2: -3.0}
    for bad in ({1: value, 2: -3.0}, {1: -0.1, 2: value}):
        assert kl_of_tops(good, bad) == kl_of_tops(bad, good) == 1000.0


def test_a_token_that_cannot_be_has_no_part_and_one_that_must_be_is_far() -> None:
    never = {1: -0.1, 2: -math.inf}
    assert kl_of_tops(never, never) == pytest.approx(0)
    assert kl_of_tops({1: 0.0}, {1: -math.inf}) == 1000.0

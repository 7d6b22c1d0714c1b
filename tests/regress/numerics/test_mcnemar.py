"""McNemar's test beside all outcomes, counted one by one."""

from __future__ import annotations

from itertools import product

import pytest

from enginehouse.regress.numerics.mcnemar import compare_solved, least_loss_seen


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 2), (7, 0), (2, 6)])
def test_p_is_the_share_of_coin_tosses_with_as_many_lost(lost: int, gained: int) -> None:
    old = [True] * lost + [False] * gained + [True, True, False]
    new = [False] * lost + [True] * gained + [True, True, False]
    found = compare_solved(old, new)
    tosses = list(product((0, 1), repeat=lost + gained))
    as_many = sum(sum(toss) >= lost for toss in tosses)
    assert found == (lost, gained, pytest.approx(as_many / len(tosses)))


def test_the_least_loss_that_is_seen_is_the_first_below_the_level() -> None:
    least = least_loss_seen(0.01)
    assert compare_solved([True] * least, [False] * least).p < 0.01
    assert compare_solved([True] * (least - 1), [False] * (least - 1)).p >= 0.01

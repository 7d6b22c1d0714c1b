"""Better, same, worse or cannot tell; and no metric the wrong way round."""

from __future__ import annotations

import numpy as np
import pytest

from enginehouse.regress.speed.metrics import (
    METRICS,
    HigherIsBetter,
    LowerIsBetter,
    Metric,
)
from enginehouse.regress.speed.settling import (
    Answer,
    Interval,
    paired_interval,
    pairs_to_settle,
    settle,
    settle_by_now,
    unpaired_interval,
)

HIGHER = {"tokens_per_s"}  # the only one of which more is better; written down a second time


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        (Interval(1.0, 0.97, 1.03), Answer.SAME),
        (Interval(0.9, 0.87, 0.94), Answer.WORSE),
        (Interval(1.2, 1.1, 1.3), Answer.BETTER),
        (Interval(0.96, 0.93, 0.99), Answer.CANNOT_TELL),
        (Interval(1.0, 0.9, 1.1), Answer.CANNOT_TELL),
        (Interval(1.02, 0.96, 1.09), Answer.NOT_WORSE),
    ],
)
def test_the_whole_interval_has_to_say_it(interval: Interval, answer: Answer) -> None:
    assert settle(interval, 0.05) is answer


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_metric_that_doubles_is_better_or_worse_by_its_own_direction(metric: Metric) -> None:
    ratios = [metric.goodness(100.0, 200.0)] * 8
    answer = settle(paired_interval(ratios, 0.99), 0.05)
    assert answer is (Answer.BETTER if metric.key in HIGHER else Answer.WORSE)
    ratios = [metric.goodness(200.0, 100.0)] * 8
    answer = settle(paired_interval(ratios, 0.99), 0.05)
    assert answer is (Answer.WORSE if metric.key in HIGHER else Answer.BETTER)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_direction_that_is_flipped_is_seen_by_the_test_above(metric: Metric) -> None:
    kind = LowerIsBetter if isinstance(metric, HigherIsBetter) else HigherIsBetter
    flipped = kind(metric.key, metric.says, metric.unit)
    with pytest.raises(AssertionError):
        test_a_metric_that_doubles_is_better_or_worse_by_its_own_direction(flipped)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        interval = paired_interval(np.exp(random.normal(0.0, 0.05, 16)).tolist(), 0.95)
        held += interval.low <= 1 <= interval.high
    assert 180 <= held <= 200


def test_noise_of_a_busy_machine_is_not_called_a_regression() -> None:
    """Pairs that vary by 10 %, a fifth of them disturbed by half, looked at again and again."""
    random = np.random.default_rng(6)
    alarms = 0
    for _ in range(60):
        noise = random.normal(0, 0.1, 40)
        noise += np.where(random.random(40) < 0.2, random.choice([-0.5, 0.5], 40), 0)
        ratios = np.exp(noise)
        for count in range(8, 42, 2):
            interval = paired_interval(ratios[:count].tolist(), 0.99)
            answer = settle_by_now(interval, 0.05, count, to_differ=16)
            if answer is not Answer.CANNOT_TELL:
                alarms += answer is Answer.WORSE
                break
    assert not alarms


def test_few_pairs_tell_what_lies_beyond_three_margins() -> None:
    for goodness, answer in ((0.5, Answer.WORSE), (0.9, Answer.CANNOT_TELL)):
        interval = Interval(goodness, goodness - 0.02, goodness + 0.02)
        assert settle_by_now(interval, 0.05, 8, to_differ=16) is answer


def test_a_tenth_slower_is_settled_by_about_as_many_more_pairs_as_it_says() -> None:
    random = np.random.default_rng(7)
    ratios = np.exp(random.normal(np.log(1 / 1.1), 0.08, 400))

    def pairs(count: int) -> Interval:
        return paired_interval(ratios[:count].tolist(), 0.99)

    first = pairs(8)
    assert settle(first, 0.05) is Answer.CANNOT_TELL
    more = pairs_to_settle(first, 0.05, 8)
    assert more is not None and 2 < more < 150
    assert settle(pairs(2 * (8 + more)), 0.05) is Answer.WORSE


def test_an_estimate_on_the_margin_is_settled_by_no_number_of_pairs() -> None:
    assert pairs_to_settle(Interval(0.9501, 0.93, 0.97), 0.05, 10) is None
    assert pairs_to_settle(Interval(1.0, 0.99, 1.01), 0.05, 10) == 0
    assert pairs_to_settle(Interval(1.0, 0.9, 1.1), 0.05, 10) == 30  # half the reach: four times


def test_what_was_not_measured_side_by_side_has_a_wider_interval() -> None:
    random = np.random.default_rng(8)
    drift = np.exp(random.normal(0, 0.2, 16))  # the machine's, on both
    old, new = (drift * 100).tolist(), (drift * 101).tolist()
    paired = paired_interval([b / a for a, b in zip(old, new, strict=True)], 0.95)
    unpaired = unpaired_interval(new, old, 0.95)
    assert paired.high - paired.low < 0.01 < unpaired.high - unpaired.low
    assert unpaired.low <= 1.01 <= unpaired.high

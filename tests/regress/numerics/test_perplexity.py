"""A loss that is real is seen, and one that is these texts' luck is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enginehouse.regress.numerics.perplexity import perplexity, perplexity_ratio


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    assert perplexity([-math.log(50)] * 7) == pytest.approx(50)


def test_the_ratio_is_that_of_the_perplexities_whatever_the_texts_lengths() -> None:
    random = np.random.default_rng(1)
    old = [list(-random.exponential(2, size)) for size in (5, 64, 300)]
    new = [[value - 0.1 for value in text] for text in old]
    ratio = perplexity_ratio(old, new, 0.99)
    flat = [value for text in old for value in text]
    worse = [value for text in new for value in text]
    assert ratio.ratio == pytest.approx(perplexity(worse) / perplexity(flat))
    assert ratio.low == pytest.approx(ratio.high)  # the same loss everywhere is no luck


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Noise that is 0 in the mean: 95 of 100 intervals should hold a ratio of 1."""
    random = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        old = [random.normal(-3, 1, 800).tolist()]
        new = [[value + float(random.normal(0, 0.2)) for value in old[0]]]
        ratio = perplexity_ratio(old, new, 0.95)
        held += ratio.low <= 1 <= ratio.high
    assert 88 <= held <= 100

"""Sampling against a sort of the whole vocabulary, and against the exact distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.runtime.request import SamplingParams
from enginehouse.runtime.sampling import SamplingState, sample

VOCAB = 3000


def make_logits(seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def state(prompt: list[int] | None = None, **params: object) -> SamplingState:
    return SamplingState(SamplingParams(max_tokens=8, **params), prompt or [0], VOCAB)  # type: ignore[arg-type]


def allowed_by_sorting(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that the parameters define, by a full sort: float64 [vocab]."""
    values, order = (logits.double() / params.temperature).sort(descending=True)
    p = values.softmax(0)
    p = torch.where(p >= params.min_p * p[0], p, 0.0)
    if params.top_k:
        p[params.top_k :] = 0.0
    p = p / p.sum()
    before = p.cumsum(0) - p
    p = torch.where(before < params.top_p, p, 0.0)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 999},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.2},
    {"min_p": 1e-6},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.99, "min_p": 1e-7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_only_tokens_that_a_full_sort_would_keep_are_drawn(
    filters: dict[str, float], temperature: float
) -> None:
    logits = make_logits(1)
    params = SamplingParams(max_tokens=8, temperature=temperature, **filters)  # type: ignore[arg-type]
    wanted = allowed_by_sorting(logits, params)
    draws = torch.tensor(
        [sample(logits.clone()[None], [SamplingState(params, [0], VOCAB)])[0] for _ in range(60)]
    )
    assert (wanted[draws] > 0).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.85}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_distribution(filters: dict[str, float]) -> None:
    logits = make_logits(2)[:12]
    params = SamplingParams(max_tokens=8, seed=5, **filters)  # type: ignore[arg-type]
    wanted = allowed_by_sorting(logits, params)
    one = SamplingState(params, [0], 12)
    n = 6000
    draws = torch.tensor([sample(logits.clone()[None], [one])[0] for _ in range(n)])
    found = draws.bincount(minlength=12) / n
    spread = (wanted * (1 - wanted) / n).sqrt()
    assert ((found - wanted).abs() <= 4.5 * spread + 1e-12).all()


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 9]] = 1.0
    logits[1, 4] = 2.0
    assert sample(logits, [state(temperature=0.0), state(temperature=0.0)]) == [7, 4]


def test_a_tiny_temperature_is_greedy_and_a_huge_logit_does_no_harm() -> None:
    logits = make_logits(3)
    logits[11] = 3e38
    assert sample(logits.clone()[None], [state(temperature=1e-30)]) == [11]
    assert sample(logits.clone()[None], [state(temperature=0.01, top_p=0.5)]) == [11]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_reported_for_their_row_only(bad: float) -> None:
    logits = torch.stack([make_logits(4), make_logits(5)])
    logits[0, 17] = bad
    good = int(logits[1].argmax())
    assert sample(logits, [state(temperature=1.0), state(temperature=0.0)]) == [-1, good]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), neighbours=st.integers(0, 3))
def test_a_seed_gives_the_same_tokens_whoever_runs_beside(seed: int, neighbours: int) -> None:
    def draw(count: int) -> list[int]:
        mine = state(seed=seed, top_p=0.95)
        others = [state() for _ in range(count)]
        rows = [make_logits(step) for step in range(4)]
        return [sample(row.repeat(count + 1, 1), [*others, mine])[-1] for row in rows]

    assert draw(0) == draw(neighbours)


def test_no_seed_means_random() -> None:
    flat = torch.zeros(1, VOCAB)
    assert len({sample(flat.clone(), [state()])[0] for _ in range(20)}) > 10


def test_penalties_are_what_their_formulas_say() -> None:
    prompt, generated = [3, 3, 4], [5, 5, 6]
    one = state(prompt, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.2)
    for token in generated:
        one.accept(token)
    logits = make_logits(6)
    wanted = logits.tolist()
    for token in {*prompt, *generated}:
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    for token in set(generated):
        wanted[token] -= 0.7 + 0.2 * generated.count(token)
    one.penalize(logits)
    assert all(
        math.isclose(a, b, abs_tol=1e-5) for a, b in zip(logits.tolist(), wanted, strict=True)
    )


def test_a_penalty_changes_its_own_row_only() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 8], logits[:, 9] = 2.0, 1.5
    strict = state(temperature=0.0, presence_penalty=1.0)
    strict.accept(8)
    assert sample(logits, [strict, state(temperature=0.0)]) == [9, 8]

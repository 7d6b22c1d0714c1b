"""Sampling against a sort of the whole vocabulary, and against the exact distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.runtime.batching.logprobs import sample_with_logprobs
from enginehouse.runtime.batching.sampling import penalize, sample, shape
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.request import Constraint, ConstraintKind, SamplingParams
from makers.bitmasks import bitmask

VOCAB = 3000


def make_logits(seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def state(prompt: list[int] | None = None, **params: object) -> SamplingState:
    return SamplingState(SamplingParams(max_tokens=8, **params), prompt or [0])  # type: ignore[arg-type]


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
        [sample(logits.clone()[None], [SamplingState(params, [0])])[0] for _ in range(60)]
    )
    assert (wanted[draws] > 0).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.85}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_distribution(filters: dict[str, float]) -> None:
    logits = make_logits(2)[:12]
    params = SamplingParams(max_tokens=8, seed=5, **filters)  # type: ignore[arg-type]
    wanted = allowed_by_sorting(logits, params)
    one = SamplingState(params, [0])
    n = 2000
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


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0001}], ids=str)
def test_one_candidate_is_the_greedy_one_among_equal_logits(filters: dict[str, float]) -> None:
    """As bfloat16 gives them: many of the largest are equal."""
    for seed in range(20):
        logits = make_logits(seed).clamp_(max=3.0).to(torch.bfloat16).float()
        assert (logits == logits.max()).sum() > 10
        greedy = sample(logits.clone()[None], [state(temperature=0.0)])
        assert sample(logits.clone()[None], [state(temperature=1.5, **filters)]) == greedy


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
    penalize(logits, one)
    assert all(
        math.isclose(a, b, abs_tol=1e-5) for a, b in zip(logits.tolist(), wanted, strict=True)
    )


def test_a_penalty_changes_its_own_row_only() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 8], logits[:, 9] = 2.0, 1.5
    strict = state(temperature=0.0, presence_penalty=1.0)
    strict.accept(8)
    assert sample(logits, [strict, state(temperature=0.0)]) == [9, 8]


def test_logit_bias_is_added_before_penalties_and_temperature() -> None:
    bias = ((3, 90.0), (5, -90.0), (8, 0.5))
    one = state([8], logit_bias=bias, repetition_penalty=2.0, temperature=0.5)
    logits = make_logits(9)
    wanted = logits.clone()
    for token, added in bias:
        wanted[token] += added
    wanted[8] = wanted[8] / 2 if wanted[8] > 0 else wanted[8] * 2
    shape(logits, one)
    assert torch.allclose(logits, wanted)
    assert sample(make_logits(9)[None], [state(logit_bias=bias)]) == [3]


def test_no_end_and_no_stop_token_before_min_tokens() -> None:
    params = SamplingParams(9, temperature=0.0, min_tokens=2, stop_token_ids=(4,))
    one = SamplingState(params, [0], eos_token_ids=(2, 6))
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 4, 6, 7]] = torch.tensor([9.0, 8.0, 7.0, 1.0])
    drawn = []
    for _ in range(3):
        drawn += sample(logits.clone(), [one])
        if drawn[-1] not in one.stop_ids:
            one.accept(drawn[-1])
    assert drawn == [7, 7, 2]


def test_ignore_eos_leaves_other_stop_tokens_in_force() -> None:
    params = SamplingParams(9, stop_token_ids=(4,), ignore_eos=True)
    assert SamplingState(params, [0], eos_token_ids=(2,)).stop_ids == {4}


class Scripted:
    """A matcher that allows only some tokens."""

    failure: str | None = None

    def __init__(self, allowed: list[int]) -> None:
        self.tokens = allowed

    def allowed(self) -> np.ndarray:
        return bitmask(self.tokens, VOCAB)

    def accept(self, token_id: int) -> None:
        assert token_id in self.tokens


def test_a_constraint_that_is_fulfilled_ends_the_text_whatever_else_was_asked() -> None:
    constraint = Constraint(ConstraintKind.REGEX, "a")
    params = SamplingParams(9, min_tokens=5, ignore_eos=True, constraint=constraint)
    one = SamplingState(params, [0], (2,), Scripted([2]))
    assert sample(make_logits(1)[None], [one]) == [2] and 2 in one.stop_ids
    one.matcher = Scripted([2, 9])
    assert all(sample(make_logits(i)[None], [one]) == [9] for i in range(10))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_only_allowed_tokens_are_drawn_under_any_filter(filters: dict[str, float]) -> None:
    allowed = [5, 77, 1999]
    for seed in range(20):
        one = state(seed=seed, repetition_penalty=1.3, **filters)
        one.matcher = Scripted(allowed)
        assert sample(make_logits(seed)[None], [one])[0] in allowed


def test_logprobs_are_of_the_logits_as_the_model_gave_them() -> None:
    logits = torch.stack([make_logits(1), make_logits(2), make_logits(3)])
    wanted = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    states = [
        state(temperature=0.3, logit_bias=((11, 50.0),), num_logprobs=5),
        state(),
        state(temperature=0.0, num_logprobs=0),
    ]
    first, second, third = sample_with_logprobs(logits, states)
    assert first.token_id == 11 and first.logprobs is not None
    assert math.isclose(first.logprobs.logprob, float(wanted[0, 11]), abs_tol=1e-4)
    best = wanted[0].sort(descending=True)
    assert [token for token, _ in first.logprobs.top] == best.indices[:5].tolist()
    for (_, found), expected in zip(first.logprobs.top, best.values.tolist(), strict=False):
        assert math.isclose(found, expected, abs_tol=1e-4)
    assert second.logprobs is None
    assert third.logprobs is not None and third.logprobs.top == ()
    assert math.isclose(third.logprobs.logprob, float(wanted[2].max()), abs_tol=1e-4)

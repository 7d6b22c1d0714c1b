"""The compiled sampler, and torch's, against a sort of the whole vocabulary in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.batching.logprobs import TorchLogits
from enginehouse.runtime.batching.sampling_state import Sampled, SamplingState
from enginehouse.runtime.batching.sequence import ScoredRow, Sequence
from enginehouse.runtime.cpu.executor import CpuRunner
from enginehouse.runtime.cpu.sampler import NativeLogits
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.request import Request, SamplingParams
from makers.bitmasks import bitmask
from makers.cpp_compiler import needs_compiler
from makers.engines import build_engine, write_tiny_checkpoint

pytestmark = [needs_compiler, pytest.mark.usefixtures("one_thread")]
VOCAB = 2500  # two blocks and a half, a word and a half of a bitmask
ROWS = 8
EOS = (2, VOCAB - 1)
NEVER = np.float32("-inf")
Sampler = Callable[[np.ndarray, list[SamplingState]], list[Sampled]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    sizes = dict(hidden=64, layers=1, heads=2, kv_heads=2, intermediate=64, vocab=VOCAB)
    source = open_checkpoint(write_tiny_checkpoint(folder / "tiny", **sizes))
    return build_engine(source, folder / "engine", quant="none", until="compile", backend="cpu")


def native(engine: Path, threads: int) -> Sampler:
    options = ExecutorOptions(max_seq_len=16, num_threads=threads)
    model = CpuRunner(read_engine(engine), options).model
    model.step(list(range(ROWS)), [ROWS], [0], [0], [0], [[0]])

    def choose(logits: np.ndarray, states: list[SamplingState]) -> list[Sampled]:
        model.logits(range(len(logits)))
        model.values[:] = logits
        return NativeLogits(model).sample(range(len(logits)), states)

    return choose


def by_torch(logits: np.ndarray, states: list[SamplingState]) -> list[Sampled]:
    return TorchLogits(torch.tensor(logits)).sample(range(len(logits)), states)


@pytest.fixture(scope="module", params=["native", "torch"])
def choose(request: pytest.FixtureRequest, engine: Path) -> Sampler:
    return native(engine, 2) if request.param == "native" else by_torch


class Allowed:
    """A matcher that allows some tokens."""

    failure: str | None = None

    def __init__(self, tokens: list[int]) -> None:
        self._words = bitmask(tokens, VOCAB)

    def allowed(self) -> np.ndarray:
        return self._words

    def accept(self, token_id: int) -> None:
        raise AssertionError("nothing is accepted here")


class Broken(Allowed):
    def allowed(self) -> np.ndarray:
        raise ZeroDivisionError


def make_logits(kind: str, seed: int) -> np.ndarray:
    values = (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)
    if kind == "tied":  # as bfloat16 gives them
        values = (torch.tensor(values).clamp(max=5).bfloat16() / 8).bfloat16().float().numpy()
    if kind == "flat":
        values[:] = -1.5
    if kind == "sparse":
        values[values < 4] = NEVER
    if kind == "far":
        values[seed % VOCAB] = 3e38
    return values


def make_state(draws: random.Random) -> SamplingState:
    """Parameters of every kind, alone and together."""

    def maybe(*values: Any) -> Any:
        return draws.choice(values) if draws.random() < 0.4 else values[0]

    params = SamplingParams(
        8,
        temperature=draws.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        top_k=maybe(0, 1, 5, 70, 999, 5000),
        top_p=maybe(1.0, 0.8765, 0.4321, 0.9999, 1e-9),
        min_p=maybe(0.0, 0.2, 1e-6, 1.0),
        presence_penalty=maybe(0.0, 0.7, -1.0),
        frequency_penalty=maybe(0.0, 0.3),
        repetition_penalty=maybe(1.0, 1.3, 0.8),
        logit_bias=maybe((), ((7, 2.0), (7, 1.0), (VOCAB - 2, -3.0))),
        min_tokens=maybe(0, 9),
        stop_token_ids=maybe((), (11, 300)),
        seed=draws.randrange(1 << 40),
        num_logprobs=maybe(None, 0, 5, 20),
    )
    state = SamplingState(params, [draws.randrange(VOCAB) for _ in range(40)], EOS)
    for _ in range(draws.randrange(5)):
        state.accept(draws.randrange(30))
    if draws.random() < 0.3:
        state.matcher = Allowed(draws.choice([[2], [2, 11], draws.sample(range(VOCAB), 900)]))
    return state


def reference(logits: np.ndarray, state: SamplingState, number: float) -> int:
    """The token that the parameters, one by one and in their order, lead to."""
    params, x = state.params, logits.copy()
    if state.matcher is not None:
        bits = np.unpackbits(state.matcher.allowed().view(np.uint8), bitorder="little")
        x[bits[:VOCAB] == 0] = NEVER
    for token, bias in params.logit_bias:
        x[token] += np.float32(bias)
    if state.counted is not None:
        pairs = zip(state.counted.ids.tolist(), state.counted.counts.tolist(), strict=True)
        for token, count in pairs:
            by = np.float32(params.repetition_penalty)
            x[token] = x[token] / by if x[token] > 0 else x[token] * by
            x[token] -= np.float32(count) * np.float32(params.frequency_penalty)
            x[token] -= np.float32(params.presence_penalty if count else 0)
    if state.num_generated < params.min_tokens:
        shut = x.copy()
        shut[[*params.stop_token_ids, *EOS]] = NEVER
        if state.matcher is None or shut.max() > NEVER:
            x = shut
    best = x.max()
    if not np.isfinite(best):
        return -1
    if params.temperature == 0 or params.min_p == 1:
        return int(np.argmax(x))
    with np.errstate(over="ignore"):
        scaled = (x - best) / np.float32(params.temperature)
    weights = np.exp(scaled.astype(np.float64))
    order = np.arange(VOCAB)
    if params.min_p or params.top_k or params.top_p < 1:
        order = np.lexsort((order, -scaled))
        order = order[weights[order] >= params.min_p]
        order = order[: params.top_k or None]
        running = np.cumsum(weights[order])
        if params.top_p < 1:
            order = order[: 1 + int(np.sum(running < params.top_p * running[-1]))]
    running = np.cumsum(weights[order])
    return int(order[np.searchsorted(running, number * running[-1], side="right")])


def check_told(found: Sampled, logits: np.ndarray, state: SamplingState) -> None:
    if state.params.num_logprobs is None or found.token_id < 0:
        assert found.logprobs is None
        return
    told = found.logprobs
    assert told is not None
    logits64 = logits.astype(np.float64)
    wanted = logits64 - logits64.max()
    wanted -= math.log(np.exp(wanted).sum())
    own = wanted[found.token_id]
    assert told.logprob == pytest.approx(own, abs=1e-4, rel=1e-5)
    assert np.sum(wanted > own + 1e-5) + 1 <= told.rank <= np.sum(wanted >= own - 1e-5)
    order = np.argsort(-wanted.astype(np.float32), kind="stable")[: state.params.num_logprobs]
    assert [token for token, _ in told.top] == order.tolist()
    assert [value for _, value in told.top] == pytest.approx(wanted[order].tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["normal", "tied", "flat", "sparse", "far"])
def test_tokens_and_log_probabilities_are_those_of_a_full_sort(choose: Sampler, kind: str) -> None:
    draws = random.Random(kind)
    for seed in range(12):
        logits = np.stack([make_logits(kind, seed * ROWS + i) for i in range(ROWS)])
        states = [make_state(draws) for _ in range(ROWS)]
        numbers = [random.Random(state.params.seed).random() for state in states]
        found = choose(logits, states)
        for row, state, number, sampled in zip(logits, states, numbers, found, strict=True):
            assert state.error is None
            assert sampled.token_id == reference(row, state, number), state.params
            check_told(sampled, row, state)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-4}], ids=str)
def test_one_candidate_is_the_first_of_the_likeliest(
    choose: Sampler, filters: dict[str, Any]
) -> None:
    logits = np.stack([make_logits("tied", seed) for seed in range(ROWS)])
    assert (logits == logits.max(axis=1, keepdims=True)).sum() > 10 * ROWS
    for temperature in (0.5, 2.0):
        states = [
            SamplingState(SamplingParams(8, temperature, **filters), [0]) for _ in range(ROWS)
        ]
        found = [sampled.token_id for sampled in choose(logits, states)]
        assert found == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("where", [0, 1337, VOCAB - 1])
def test_a_row_without_a_largest_number_has_no_token(
    choose: Sampler, bad: float | None, where: int
) -> None:
    logits = np.stack([make_logits("normal", seed) for seed in range(3)])
    logits[1] = NEVER if bad is None else logits[1]
    logits[1, where] = NEVER if bad is None else bad
    params = [{"temperature": 0.0}, {"num_logprobs": 3, "top_p": 0.9}, {"top_k": 1}]
    states = [SamplingState(SamplingParams(8, seed=1, **given), [0]) for given in params]  # type: ignore[arg-type]
    first, second, third = choose(logits, states)
    assert second == Sampled(-1)
    assert [first.token_id, third.token_id] == logits[[0, 2]].argmax(axis=1).tolist()


def test_an_answer_depends_on_its_row_alone(engine: Path) -> None:
    """To the bit, alone and beside others, on one thread and on two."""
    logits = np.stack([make_logits("normal", seed) for seed in range(ROWS)])

    def states() -> list[SamplingState]:
        draws = random.Random(5)
        return [make_state(draws) for _ in range(ROWS)]

    one, two = native(engine, 1), native(engine, 2)
    together = two(logits, states())
    assert one(logits, states()) == together
    for i in range(ROWS):
        for alone in (one, two):
            assert alone(logits[i : i + 1], states()[i : i + 1]) == [together[i]]


def test_rows_are_sampled_in_any_order_and_some_at_a_time(engine: Path) -> None:
    """As those of one sequence are, whose state goes on between them."""
    model = CpuRunner(read_engine(engine), ExecutorOptions(max_seq_len=16)).model
    model.step(list(range(ROWS)), [ROWS], [0], [0], [0], [[0]])
    model.logits(range(ROWS))
    model.values[:] = np.stack([make_logits("normal", 1)] * ROWS)
    state = SamplingState(SamplingParams(8, 0.0, presence_penalty=100.0), [0])
    found = []
    for row in (3, 1, 6):
        [sampled] = NativeLogits(model).sample([row], [state])
        found.append(sampled.token_id)
        state.accept(sampled.token_id)
    assert found == np.argsort(-make_logits("normal", 1))[:3].tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompts_tokens_are_told_from_every_row(engine: Path, threads: int) -> None:
    options = ExecutorOptions(max_seq_len=16, num_threads=threads)
    model = CpuRunner(read_engine(engine), options).model
    model.step(list(range(ROWS)), [ROWS], [0], [0], [0], [[0]])
    model.logits(range(ROWS))
    logits = np.stack([make_logits("tied" if seed % 2 else "normal", seed) for seed in range(ROWS)])
    logits[3, 5] = float("nan")
    model.values[:] = logits
    prompt = [random.Random(1).randrange(VOCAB) for _ in range(ROWS + 1)]
    params = SamplingParams(1, num_prompt_logprobs=4)
    sequence = Sequence(Request(0, prompt, params), SamplingState(params, prompt), list(prompt))
    found = NativeLogits(model).score([ScoredRow(sequence, i) for i in range(ROWS)])
    asked = SamplingState(SamplingParams(1, num_logprobs=4), [0])
    for i, told in enumerate(found):
        assert told is not None
        if i == 3:
            assert math.isnan(told.logprob)
        else:
            check_told(Sampled(prompt[i + 1], told), logits[i], asked)


def test_a_grammar_that_raises_fails_its_own_sequence(choose: Sampler) -> None:
    logits = np.stack([make_logits("normal", 1)] * 2)
    states = [SamplingState(SamplingParams(8, 0.0, num_logprobs=2), [0]) for _ in range(2)]
    states[0].matcher = Broken([2])
    first, second = choose(logits, states)
    assert (first, second.token_id) == (Sampled(-1), int(logits[1].argmax()))
    assert isinstance(states[0].error, ZeroDivisionError) and states[1].error is None
    check_told(second, logits[1], states[1])


def test_an_end_token_outside_the_vocabulary_fails_its_own_sequence(engine: Path) -> None:
    logits = np.stack([make_logits("normal", 1)] * 2)
    params = SamplingParams(8, 0.0, min_tokens=2)
    states = [SamplingState(params, [0], (VOCAB,)), SamplingState(params, [0], (2,))]
    found = native(engine, 1)(logits, states)
    assert [sampled.token_id for sampled in found] == [-1, int(logits[1].argmax())]
    assert isinstance(states[0].error, EngineError) and states[1].error is None

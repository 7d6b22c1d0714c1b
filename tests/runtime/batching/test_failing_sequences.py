"""Whatever raises in the part of a step that is one sequence's ends that sequence, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching import logprobs, sampling
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.grammar import matcher
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from makers.engines import EngineMaker

VICTIM = 9
JSON = Constraint(ConstraintKind.JSON_OBJECT, "")
WORDS = Constraint(ConstraintKind.CHOICE, '["the fields and the river", "the bridge"]')
# Everyone else's part of a step: greedy, drawn, drawn with filters, scored, constrained.
NEIGHBOURS = [
    Request(1, [5, 6, 7], SamplingParams(12, 0.0, ignore_eos=True)),
    Request(2, list(range(40, 90)), SamplingParams(12, 1.0, seed=2, ignore_eos=True)),
    Request(3, [11], SamplingParams(12, 0.9, top_p=0.9, seed=3, ignore_eos=True)),
    Request(4, [12, 13], SamplingParams(12, 1.0, seed=4, num_logprobs=2, presence_penalty=1.0)),
    Request(5, [14], SamplingParams(12, 1.0, seed=5, constraint=WORDS)),
]
Executor = InflightExecutor[Any]
Injection = Callable[[Executor, pytest.MonkeyPatch], None]


class Fault(Exception):
    """Nothing that anybody catches by name."""


def fail(*_: object) -> Any:
    raise Fault("this part is broken")


def state_of(executor: Executor) -> SamplingState:
    return executor._sequences[VICTIM].sampling


def break_state(name: str) -> Injection:
    """A method of the victim's sampling state."""
    return lambda executor, patch: patch.setattr(state_of(executor), name, fail)


def break_matcher(name: str) -> Injection:
    return lambda executor, patch: patch.setattr(state_of(executor).matcher, name, fail)


def break_penalties(executor: Executor, patch: pytest.MonkeyPatch) -> None:
    real, victim = sampling.penalize, state_of(executor)

    def penalize(logits: Any, state: SamplingState) -> None:
        return fail() if state is victim else real(logits, state)

    patch.setattr(sampling, "penalize", penalize)


def break_draw(name: str) -> Injection:
    """What draws for a batch, where the victim is in it."""

    def inject(executor: Executor, patch: pytest.MonkeyPatch) -> None:
        real, victim = getattr(sampling, name), state_of(executor)

        def draw(scaled: Any, states: Sequence[SamplingState], *rest: Any) -> Any:
            return fail() if victim in states else real(scaled, states, *rest)

        patch.setattr(sampling, name, draw)

    return inject


def break_logprobs(executor: Executor, patch: pytest.MonkeyPatch) -> None:
    real = logprobs.logprobs_of_rows

    def of_rows(rows: Any, tokens: Any, counts: Sequence[int]) -> Iterator[TokenLogprobs]:
        return fail() if 7 in counts else real(rows, tokens, counts)

    patch.setattr(logprobs, "logprobs_of_rows", of_rows)


def break_settling(executor: Executor, patch: pytest.MonkeyPatch) -> None:
    real, victim = executor.scheduler.settle, executor._sequences[VICTIM]

    def settle(chunk: Any, *rest: Any, **more: Any) -> Any:
        return fail() if chunk.sequence is victim else real(chunk, *rest, **more)

    patch.setattr(executor.scheduler, "settle", settle)


FREE = SamplingParams(12, 1.0, ignore_eos=True)
FAULTS: dict[str, tuple[SamplingParams, Injection]] = {
    "mask": (SamplingParams(12, constraint=JSON), break_matcher("allowed")),
    "matcher's accept": (SamplingParams(12, constraint=JSON), break_matcher("accept")),
    "penalties": (FREE, break_penalties),
    "accept": (FREE, break_state("accept")),
    "draw": (FREE, break_draw("_draw")),
    "filtered draw": (
        SamplingParams(12, 1.0, top_k=5, ignore_eos=True),
        break_draw("_draw_filtered"),
    ),
    "logprobs": (SamplingParams(12, 1.0, num_logprobs=7, ignore_eos=True), break_logprobs),
    "settling": (FREE, break_settling),
}


@pytest.fixture(scope="module")
def executor(make_engine: EngineMaker) -> Iterator[Executor]:
    engine = make_engine(quant="none", dtype="float32")
    opened = open_executor(engine, ExecutorOptions(compute_dtype="float32"))
    assert isinstance(opened, InflightExecutor)
    yield opened
    opened.close()


def run(executor: Executor) -> list[TokenOutput]:
    outputs = []
    while executor.busy:
        outputs += executor.poll(0.1)
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for output in outputs:
        if output.request_id != VICTIM:
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.fixture(scope="module")
def alone(executor: Executor) -> dict[int, list[int]]:
    """What the neighbours say when nothing fails beside them."""
    for request in NEIGHBOURS:
        executor.submit(request)
    found = tokens_of(run(executor))
    assert set(found) == {1, 2, 3, 4, 5}
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_sequence_ends_it_and_changes_no_neighbours_token(
    name: str,
    executor: Executor,
    alone: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    params, inject = FAULTS[name]
    executor.submit(Request(VICTIM, [21, 22, 23], params, label="client-7"))
    outputs: list[TokenOutput] = []
    while VICTIM not in {output.request_id for output in outputs}:  # its first token is there
        outputs += executor.poll(0.1)
    for request in NEIGHBOURS:
        executor.submit(request)
    inject(executor, monkeypatch)
    outputs += run(executor)
    *_, end = [output for output in outputs if output.request_id == VICTIM]
    assert end.finish_reason is FinishReason.ERROR and end.refusal is None
    assert end.error is not None and "Fault: this part is broken" in end.error
    assert "request client-7 failed; the others go on" in caplog.text
    assert caplog.records[0].__dict__["request_id"] == "client-7"
    assert "test_failing_sequences.py" in caplog.text, "the log says where"
    assert tokens_of(outputs) == alone
    stats = executor.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_a_prompt_that_cannot_be_scored_ends_its_own_sequence(
    executor: Executor, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that is scored too, over several iterations."""
    scored = SamplingParams(4, 0.0, ignore_eos=True, num_prompt_logprobs=2)
    prompt = list(range(100, 200))
    executor.submit(Request(6, prompt, scored))
    wanted = [score for o in run(executor) for score in o.prompt_logprobs or []]
    assert len(wanted) == len(prompt) - 1
    break_logprobs(executor, monkeypatch)
    victim = Request(VICTIM, prompt[::-1], replace(scored, num_prompt_logprobs=7))
    for request in [victim, Request(6, prompt, scored), *NEIGHBOURS]:
        executor.submit(request)
    outputs = run(executor)
    [end] = [output for output in outputs if output.request_id == VICTIM]
    assert end.error is not None and "Fault: this part is broken" in end.error
    found = [score for o in outputs if o.request_id == 6 for score in o.prompt_logprobs or []]
    assert [score.logprob for score in found] == pytest.approx(
        [s.logprob for s in wanted], abs=1e-5
    )
    assert {k: v for k, v in tokens_of(outputs).items() if k != 6} == alone
    assert not executor._scores


def test_a_grammar_that_cannot_be_followed_from_its_start_ends_its_own_sequence(
    executor: Executor, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As xgrammar raises for stop tokens that it does not know."""
    real = matcher.GrammarMatcher

    def make(compiled: Any, stop_ids: set[int]) -> Any:
        return fail() if 77 in stop_ids else real(compiled, stop_ids)

    monkeypatch.setattr(matcher, "GrammarMatcher", make)
    params = SamplingParams(12, constraint=JSON, stop_token_ids=(77,))
    for request in [*NEIGHBOURS, Request(VICTIM, [21], params)]:
        executor.submit(request)
    outputs = run(executor)
    [end] = [output for output in outputs if output.request_id == VICTIM]
    assert end.finish_reason is FinishReason.ERROR and end.refusal is None
    assert tokens_of(outputs) == alone


def test_a_step_that_fails_as_a_whole_is_raised(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's tokens are known then: the host ends, and every client is told."""
    executor.submit(NEIGHBOURS[0])
    with monkeypatch.context() as patch:
        patch.setattr(executor.runner, "compute", fail)
        with pytest.raises(Fault):
            executor.poll()
    executor.cancel(1)
    assert not executor.busy

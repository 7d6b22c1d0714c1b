"""Drafted tokens change nothing but how many iterations an answer takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching.drafts import Lookup, Speculation, speculation_of
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, check_speculation
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
)
from makers.cpp_compiler import needs_compiler
from makers.engines import EngineMaker, SourceMaker, engine_maker

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3
WORDS = Constraint(ConstraintKind.REGEX, "(the fields and the river, ){8}the bridge")
STOPS = tuple(range(100, 140))
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.3, "seed": 4, "top_p": 0.9, "top_k": 30, "min_p": 0.01},
    "penalties": {"temperature": 0.0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "biased": {"temperature": 0.0, "logit_bias": ((9, 4.0), (300, -9.0))},
    "told": {"temperature": 0.8, "seed": 5, "num_logprobs": 3, "num_prompt_logprobs": 2},
    "stops": {"temperature": 1.0, "seed": 6, "stop_token_ids": STOPS, "min_tokens": 9},
    "constrained": {"temperature": 0.0, "num_logprobs": 1, "constraint": WORDS},
}
Drafter = Callable[[Lookup, list[int], int, float], list[int]]
Executor = InflightExecutor[Any]


@pytest.fixture(scope="module")
def executor(
    family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Executor]:
    """Of a model whose keys turn otherwise beyond 32 tokens, and whose answers get there; with
    memory for few of its blocks, so that sequences are preempted.
    """
    choices = {"quant": "none", "dtype": "bfloat16", "until": "compile", "backend": "cpu"}
    make = engine_maker(family_source, tmp_path_factory.mktemp("engines"), **choices)
    path = make("phi3-longrope")
    options = ExecutorOptions(max_seq_len=96, num_threads=1, speculative_batch_size=8)
    info = open_executor(path, options).info
    few_gib = 28 * info.kv_cache_bytes / info.num_kv_blocks / 2**30
    options = options._replace(kv_cache_gib=few_gib)
    opened = open_executor(path, options)
    assert isinstance(opened, InflightExecutor)
    yield opened
    opened.close()


def answers(executor: Executor, work: list[Request]) -> dict[int, Any]:
    """Tokens, their log probabilities, those of the prompt, and how it ended."""
    told: dict[int, Any] = {}
    for request in work:
        executor.submit(request)
        told[request.request_id] = [[], [], [], None]
    while executor.busy:
        for output in executor.poll(0.1):
            assert output.error is None, output.error
            found = told[output.request_id]
            found[0] += output.token_ids
            found[1] += output.logprobs or []
            found[2] += output.prompt_logprobs or []
            found[3] = output.finish_reason, output.stop_token_id, output.stop_logprobs
    return told


def requests() -> list[Request]:
    return [
        Request(i, PROMPT[i:], SamplingParams(60, **{"ignore_eos": True, **params}))
        for i, params in enumerate(PARAMS.values())
    ]


def plain(executor: Executor, work: list[Request], patch: pytest.MonkeyPatch) -> dict[int, Any]:
    with patch.context() as without:
        without.setattr(executor.scheduler, "speculation", None)
        return answers(executor, work)


def sometimes_right(truth: dict[int, Any]) -> Drafter:
    """What comes, but for a token here and there, whatever a draft is worth."""
    rng = random.Random(1)
    texts = [[*PROMPT[i:], *found[0]] for i, found in truth.items()]

    def draft(_: Lookup, token_ids: list[int], most: int, least_chance: float) -> list[int]:
        [text, *_] = [t for t in texts if t[: len(token_ids)] == token_ids]
        found = text[len(token_ids) : len(token_ids) + max(0, most)]
        return [rng.randrange(300) if rng.random() < 0.2 else token for token in found]

    return draft


@needs_compiler
def test_answers_are_the_same_whatever_is_drafted(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = plain(executor, requests(), monkeypatch)
    assert executor.stats().num_draft_tokens == 0
    assert len(truth[0][0]) == 60 and truth[6][3][0] is FinishReason.STOP
    preempted = executor.stats().num_preemptions
    assert answers(executor, requests()) == truth
    before = executor.stats()
    assert before.num_draft_tokens >= before.num_accepted_tokens > 0
    for _ in range(2):  # what steps take on a busy machine decides how much is drafted
        monkeypatch.setattr(Lookup, "draft", sometimes_right(truth))
        assert answers(executor, requests()) == truth
    after = executor.stats()
    drafted = after.num_draft_tokens - before.num_draft_tokens
    right = after.num_accepted_tokens - before.num_accepted_tokens
    assert 0.3 * drafted < right < 0.9 * drafted and right > 30
    assert after.num_preemptions > before.num_preemptions > preempted > 0


@needs_compiler
def test_blocks_that_others_find_hold_no_key_of_a_wrong_draft(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(30, temperature=0.0, ignore_eos=True, num_logprobs=4)
    work = [Request(1, [20, *PROMPT[:7]], params)]
    wrong = [0] * 5
    monkeypatch.setattr(Lookup, "draft", lambda self, ids, most, chance: wrong[: max(0, most)])
    [first] = answers(executor, work).values()
    longer = [20, *PROMPT[:7], *first[0]]
    cached = executor.stats().num_cached_tokens
    [shared] = answers(executor, [Request(2, longer, params)]).values()
    assert executor.stats().num_cached_tokens - cached == 32
    unshared = SamplingParams(30, 0.0, ignore_eos=True, num_logprobs=4, seed=1)
    [alone] = plain(executor, [Request(3, longer, unshared)], monkeypatch).values()
    assert shared == alone


@needs_compiler
def test_what_fails_behind_a_draft_ends_one_sequence_after_its_tokens(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [Request(i, PROMPT, SamplingParams(12, 0.0, ignore_eos=True, seed=i)) for i in (0, 1)]
    truth = plain(executor, work, monkeypatch)
    right = [*PROMPT, *truth[0][0]]
    monkeypatch.setattr(Lookup, "draft", lambda self, ids, most, chance: right[len(ids) :][:most])
    for request in work:
        executor.submit(request)
    victim, accept = executor._sequences[0].sampling, SamplingState.accept

    def break_one(state: SamplingState, token_id: int) -> None:
        if state is victim and state.num_generated == 4:
            raise ValueError("this part is broken")
        accept(state, token_id)

    monkeypatch.setattr(SamplingState, "accept", break_one)
    told: dict[int, list[int]] = {0: [], 1: []}
    errors = []
    while executor.busy:
        for output in executor.poll():
            told[output.request_id] += output.token_ids
            errors += [output.error] if output.error else []
    assert told == {0: truth[0][0][:4], 1: truth[1][0]}
    assert len(errors) == 1 and "this part is broken" in errors[0]


def test_what_followed_before_is_drafted_as_far_as_it_is_worth_it() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert Lookup(3).draft(tokens, 5, 0.29) == [4]
    assert Lookup(3).draft(tokens, 5, 0.0) == [4, 5, 6, 1, 2]
    assert Lookup(3).draft(tokens, 5, 0.31) == Lookup(3).draft([*tokens, 9], 5, 0.0) == []
    assert Lookup(3).draft([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 1, 0.0) == [4], "the longest run"
    assert Lookup(2).draft([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 1, 0.0) == [7], "the latest"
    assert Lookup(1).draft([8, 4, 8], 9, 0.0) == [4, 8]


def test_drafts_end_while_they_are_wrong_and_begin_again_without_one() -> None:
    lookup, tokens = Lookup(2), [1, 2]
    wrong = 0
    for i in range(200):  # what followed before is another number every time
        tokens += [500 + i, 1, 2]
        wrong += len(lookup.draft(tokens, 5, 0.2))
    assert 0 < wrong < 8
    lengths = []
    for token in [600, 601, 602, 603, 604, 605] * 5:
        tokens.append(token)
        lengths.append(len(lookup.draft(tokens, 5, 0.2)))
    assert lengths[0] == 0 and lengths[-1] == 5 and lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("asked", "backend", "message"),
    [
        ({"speculative": "ngram"}, "torch", "speculative=ngram is for .* backend=torch; leave it"),
        ({"max_matching_ngram_size": 2}, "tensorrt", "max_matching_ngram_size is for"),
        ({"speculative_batch_size": 2}, "tensorrt_llm", "this is backend=tensorrt_llm"),
        (
            {"speculative": "off", "num_speculative_tokens": 4},
            "cpu",
            "num_speculative_tokens says how .* speculative=off that none are; leave one",
        ),
    ],
)
def test_drafts_are_refused_where_none_can_be(
    asked: dict[str, Any], backend: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_speculation(ExecutorOptions(**asked), backend)
    check_speculation(ExecutorOptions(speculative="off"), backend)


def test_an_engine_of_another_backend_refuses_drafts(make_engine: EngineMaker) -> None:
    with pytest.raises(EngineError, match="speculative=ngram"):
        open_executor(make_engine(), ExecutorOptions(speculative="ngram"))


def test_what_is_not_said_of_drafts_is_as_usual() -> None:
    assert speculation_of(ExecutorOptions()) == Speculation()
    assert speculation_of(ExecutorOptions(speculative="off")) is None
    asked = ExecutorOptions(num_speculative_tokens=7, speculative_batch_size=2)
    assert speculation_of(asked) == Speculation(num_tokens=7, batch_size=2)

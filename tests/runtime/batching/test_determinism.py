"""The same request with the same seed: the same text, whatever the engine did before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int | None, max_tokens: int = 24, num_logprobs: int | None = 3) -> SamplingParams:
    return SamplingParams(
        max_tokens, temperature=0.9, seed=seed, ignore_eos=True, num_logprobs=num_logprobs
    )


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, 500) for _ in range(rng.randrange(2, 180))] for _ in range(count)]


def traces(executor: Executor, requests: list[Request]) -> dict[int, list[object]]:
    """Tokens and the very bits of their logprobs, by request."""
    found: dict[int, list[object]] = {request.request_id: [] for request in requests}
    for request in requests:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll(0.1):
            found[output.request_id] += [output.token_ids, output.logprobs]
    return found


@pytest.fixture(scope="module")
def engine(make_engine: EngineMaker) -> Path:
    return make_engine(quant="int4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_seed_gives_the_same_bits_on_an_idle_engine_whatever_is_cached(
    engine: Path, dtype: str, deterministic: bool
) -> None:
    options = ExecutorOptions(compute_dtype=dtype, deterministic=deterministic)
    cold = open_executor(engine, options)
    work = [Request(i, prompt, seeded(i)) for i, prompt in enumerate(prompts(4))]
    first = [traces(cold, [request]) for request in work]
    used = open_executor(engine, options)
    for request in work:  # the prompts, their beginnings and their answers are in the cache
        ids, rest = request.prompt_ids, request.prompt_ids[: len(request.prompt_ids) // 2]
        generate(used, [Request(100, ids, seeded(None)), Request(101, rest, seeded(None))])
    assert [traces(used, [request]) for request in work] == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "int4", "fp8"])
def test_a_deterministic_engine_gives_the_same_bits_beside_neighbours_and_when_preempted(
    make_engine: EngineMaker, dtype: str, quant: str
) -> None:
    engine = make_engine(quant=quant)
    options = ExecutorOptions(max_seq_len=256, compute_dtype=dtype, deterministic=True)
    work = [Request(i, prompt, seeded(i, 30)) for i, prompt in enumerate(prompts(5))]
    greedy = SamplingParams(30, temperature=0.0, num_logprobs=1)
    work += [Request(20 + i, prompt, greedy) for i, prompt in enumerate(prompts(2))]
    roomy = open_executor(engine, options)
    alone: dict[int, list[object]] = {}
    for request in work:
        alone |= traces(roomy, [request])
    assert traces(roomy, work) == alone
    bytes_per_token = 2 * 4 * 32 * 4 * 2 // (1 if dtype == "float32" else 2)
    gib = 272 * bytes_per_token / 2**30
    cramped = open_executor(engine, options._replace(kv_cache_gib=gib))
    assert traces(cramped, work) == alone
    assert cramped.stats().num_preemptions > 0


def test_without_a_seed_no_two_answers_are_alike(engine: Path) -> None:
    executor = open_executor(engine, ExecutorOptions(deterministic=True))
    work = [Request(i, [5, 6, 7], seeded(None)) for i in range(6)]
    assert len({str(tokens) for tokens in generate(executor, work).values()}) == 6

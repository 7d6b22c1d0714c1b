"""The torch executor against transformers in float32, and a batch against its members alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate, stream
from enginehouse.runtime.request import FinishReason, Request, SamplingParams, TokenOutput
from makers.engines import EngineMaker

FLOAT32 = ExecutorOptions(compute_dtype="float32")
PROMPTS = [
    [5, 6, 7],
    list(range(40, 90)),
    [11],
    list(range(300, 417)),
    [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9],
]


def greedy(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)


def requests(prompts: list[list[int]], sampling: SamplingParams) -> list[Request]:
    return [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]


def answers_of_transformers(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy by running the whole sequence again for every token: no cache to be wrong about."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(24):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.fixture(scope="module")
def tiny_answers(tiny_checkpoint: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return answers_of_transformers(model, PROMPTS)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (8, 1)])
def test_greedy_tokens_equal_transformers_for_every_cut(
    make_engine: EngineMaker, tiny_answers: list[list[int]], tp: int, pp: int
) -> None:
    engine = make_engine(quant="none", dtype="float32", tp=tp, pp=pp)
    executor = open_executor(engine, FLOAT32)
    together = generate(executor, requests(PROMPTS, greedy()))
    assert [together[i] for i in range(len(PROMPTS))] == tiny_answers


@pytest.mark.parametrize("quant", ["none", "int4", "fp8"])
def test_a_batch_equals_its_members_run_alone(make_engine: EngineMaker, quant: str) -> None:
    engine = make_engine(quant=quant)
    executor = open_executor(engine, FLOAT32)
    together = generate(executor, requests(PROMPTS, greedy()))
    for i, prompt in enumerate(PROMPTS):
        alone = open_executor(engine, FLOAT32)
        assert generate(alone, [Request(i, prompt, greedy())]) == {i: together[i]}


@pytest.mark.parametrize("quant", ["none", "int4", "fp8"])
def test_a_checkpoint_for_four_gpus_answers_as_the_one_for_one(
    make_engine: EngineMaker, quant: str
) -> None:
    form = {"quant": quant, **({"group_size": 64} if quant == "int4" else {})}
    one = open_executor(make_engine(**form), FLOAT32)
    four = open_executor(make_engine(**form, tp=4, pp=2), FLOAT32)
    work = requests(PROMPTS, greedy())
    assert generate(one, work) == generate(four, work)


def test_preemption_changes_no_token(make_engine: EngineMaker) -> None:
    engine = make_engine(quant="none", dtype="float32", max_seq_len=256)
    work = requests(PROMPTS, greedy(100))
    roomy = open_executor(engine, FLOAT32)
    wanted = generate(roomy, work)
    bytes_per_token = 2 * 4 * 32 * 4 * 2  # k and v, heads, head size, float32, layers
    gib = 272 * bytes_per_token / 2**30
    cramped = open_executor(engine, FLOAT32._replace(kv_cache_gib=gib))
    assert cramped.info.num_kv_blocks == 17
    assert generate(cramped, work) == wanted
    assert cramped.stats().num_preemptions > 0


def test_a_prefix_seen_before_changes_no_token(make_engine: EngineMaker) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    prompt = list(range(40, 120))
    first = generate(executor, [Request(1, prompt, greedy())])[1]
    second = list(stream(executor, Request(2, prompt, greedy())))
    assert [token for output in second for token in output.token_ids] == first
    assert second[0].num_cached_tokens == 64, "four blocks of sixteen; the last token is computed"
    assert executor.stats().num_cached_tokens == 64


def test_a_seeded_sequence_does_not_depend_on_its_neighbours(make_engine: EngineMaker) -> None:
    engine = make_engine(quant="none", dtype="float32")
    seeded = SamplingParams(20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = generate(open_executor(engine, FLOAT32), [Request(0, [5, 6, 7], seeded)])[0]
    crowd = [Request(i, prompt, SamplingParams(20)) for i, prompt in enumerate(PROMPTS, start=1)]
    together = generate(open_executor(engine, FLOAT32), [*crowd, Request(0, [5, 6, 7], seeded)])
    assert together[0] == alone


def test_logprobs_equal_transformers_whatever_is_done_to_the_sampling(
    make_engine: EngineMaker, tiny_checkpoint: Path
) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    params = [
        SamplingParams(12, 0.0, ignore_eos=True, num_logprobs=5),
        SamplingParams(12, 0.7, seed=1, ignore_eos=True, num_logprobs=3, logit_bias=((9, 4.0),)),
        SamplingParams(12, 1.3, seed=2, ignore_eos=True, num_logprobs=0, presence_penalty=1.5),
        SamplingParams(12, 1.0, seed=3, ignore_eos=True, top_k=4),
    ]
    outputs: dict[int, list[TokenOutput]] = {i: [] for i in range(4)}
    for i, sampling in enumerate(params):
        executor.submit(Request(i, PROMPTS[i], sampling))
    while executor.busy:
        for output in executor.poll():
            outputs[output.request_id].append(output)
    assert all(output.logprobs is None for output in outputs.pop(3))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for i, found in outputs.items():
        tokens = [token for output in found for token in output.token_ids]
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPTS[i] + tokens])).logits[0]
        wanted = logits[len(PROMPTS[i]) - 1 : -1].log_softmax(-1)
        given = [logprobs for output in found for logprobs in output.logprobs or []]
        assert len(given) == len(tokens)
        for row, token, logprobs in zip(wanted, tokens, given, strict=True):
            assert abs(float(row[token]) - logprobs.logprob) < 1e-4
            best = row.topk(params[i].num_logprobs or 0)
            assert [t for t, _ in logprobs.top] == best.indices.tolist()
            for (_, value), expected in zip(logprobs.top, best.values.tolist(), strict=True):
                assert abs(value - expected) < 1e-4


@pytest.fixture
def executor(make_engine: EngineMaker) -> Executor:
    return open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)


def test_who_watches_a_plan_sees_a_prompt_begun_before_it_is_computed(executor: Executor) -> None:
    seen: list[tuple[list[bool], int]] = []

    def look() -> None:
        waits = [executor.waits(request.request_id) for request in asked]
        seen.append((waits, executor.stats().num_iterations))

    executor.on_planned = look
    most = executor.info.max_batch_size
    asked = requests([[3, 4, 5]] * (most + 1), greedy(2))
    for request in asked:
        executor.submit(request)
    assert all(executor.waits(request.request_id) for request in asked)
    executor.poll()
    assert seen == [([False] * most + [True], 0)], "no iteration has ended by then"


def test_a_stop_token_ends_the_sequence_and_is_not_given_out(executor: Executor) -> None:
    free = generate(executor, [Request(1, [5, 6, 7], greedy())])[1]
    stop = free[3]
    params = SamplingParams(24, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    outputs = list(stream(executor, Request(2, [5, 6, 7], params)))
    assert [t for o in outputs for t in o.token_ids] == free[: free.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_token_id == stop


def test_max_tokens_ends_a_sequence_with_length(executor: Executor) -> None:
    outputs = list(stream(executor, Request(1, [5], greedy(3))))
    assert sum(len(o.token_ids) for o in outputs) == 3
    assert [o.finish_reason for o in outputs] == [None, None, FinishReason.LENGTH]


def test_a_cancelled_sequence_is_gone_before_the_next_iteration(executor: Executor) -> None:
    executor.submit(Request(1, [5, 6, 7], greedy(100)))
    executor.submit(Request(2, [8, 9], greedy(5)))
    executor.poll()
    executor.cancel(1)
    executor.cancel(1)
    assert {output.request_id for output in executor.poll()} == {2}
    assert executor.stats().num_running == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "the prompt has 0 tokens; wanted 1 to 2047"),
        ([1] * 2048, 4, "the prompt has 2048 tokens"),
        ([1, 512], 4, "outside the vocabulary of 512"),
        ([-1], 4, "outside the vocabulary"),
        ([1], -1, "max_tokens is -1; wanted at least 0"),
    ],
)
def test_what_can_never_run_is_refused(
    executor: Executor, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        executor.submit(Request(1, prompt, SamplingParams(max_tokens)))
    assert not executor.busy


def test_a_bias_on_a_token_that_is_none_is_refused(executor: Executor) -> None:
    params = SamplingParams(4, logit_bias=((512, 1.0),))
    with pytest.raises(RequestError, match="outside the vocabulary of 512") as caught:
        executor.submit(Request(1, [3], params))
    assert caught.value.param == "logit_bias" and not executor.busy


def test_a_cache_too_small_for_one_sequence_is_refused(make_engine: EngineMaker) -> None:
    with pytest.raises(EngineError, match="one sequence of max_seq_len=2048 needs .* GiB"):
        open_executor(make_engine(), ExecutorOptions(kv_cache_gib=0.0001))


def test_a_cache_larger_than_what_is_free_is_refused(make_engine: EngineMaker) -> None:
    message = "kv_cache_gib=1e.09 was asked for and .* GiB are free on the cpu; ask for less"
    with pytest.raises(EngineError, match=message):
        open_executor(make_engine(), ExecutorOptions(kv_cache_gib=1e9))


@pytest.mark.parametrize(
    ("free", "batch", "sequences"),
    [
        (1 << 40, 8, 4),  # of the full context, whatever is free
        (1 << 40, 2, 2),  # what the batch can use
        (12 * 2048 * 2048, 8, 3),  # a quarter of what is free; a token takes 2048 bytes
    ],
)
def test_a_cache_that_nobody_sized_suits_the_model(
    make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    batch: int,
    sequences: int,
) -> None:
    monkeypatch.setattr("enginehouse.runtime.torch.executor.free_memory", lambda device: free)
    engine = make_engine(quant="none", dtype="float32")
    info = open_executor(engine, FLOAT32._replace(max_batch_size=batch)).info
    assert info.num_kv_blocks * info.kv_block_size == sequences * 2048
    assert info.kv_cache_bytes == sequences * 2048 * 2 * 4 * 32 * 4 * 2


def test_a_cache_may_take_as_much_as_the_weights(make_engine: EngineMaker) -> None:
    """Short contexts: four sequences take less than the weights do."""
    engine = make_engine(quant="none", dtype="float32")
    info = open_executor(engine, FLOAT32._replace(max_seq_len=32, max_batch_size=1000)).info
    weights = (engine / "rank0.safetensors").stat().st_size
    assert 0 <= weights - info.kv_cache_bytes < 16 * 2048, "to a block"


def test_what_sequences_hold_is_told_from_what_is_remembered(make_engine: EngineMaker) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    executor.submit(Request(1, list(range(40, 80)), greedy(4)))
    executor.poll()
    stats = executor.stats()
    assert stats.num_kv_blocks - stats.num_free_kv_blocks == 3
    assert stats.num_remembered_kv_blocks == 0
    while executor.busy:
        executor.poll()
    stats = executor.stats()
    assert stats.num_free_kv_blocks == stats.num_kv_blocks
    assert stats.num_remembered_kv_blocks == 2, "the last of its three blocks is not full"


def test_limits_above_the_engines_are_refused(make_engine: EngineMaker) -> None:
    with pytest.raises(EngineError, match="max_seq_len=4096 was asked for .* built for 2048"):
        open_executor(make_engine(), ExecutorOptions(max_seq_len=4096))

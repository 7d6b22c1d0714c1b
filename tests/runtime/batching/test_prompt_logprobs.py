"""The log probabilities of prompts against transformers in float32, whatever runs beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from enginehouse.runtime import logprobs
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.request import FinishReason, Request, SamplingParams, TokenOutput
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = ExecutorOptions(compute_dtype="float32")
PROMPTS = [list(range(300, 417)), [5, 6, 7], [11], [*range(40, 90), *range(20, 90)], [9] * 17]


def scoring(num_top: int = 3, max_tokens: int = 1, **more: object) -> SamplingParams:
    given: dict[str, object] = {"temperature": 0.0, "ignore_eos": True, **more}
    return SamplingParams(max_tokens, num_prompt_logprobs=num_top, **given)  # type: ignore[arg-type]


def outputs_of(executor: Executor, work: list[Request]) -> dict[int, list[TokenOutput]]:
    """Everything that is told of requests which run together."""
    told: dict[int, list[TokenOutput]] = {request.request_id: [] for request in work}
    for request in work:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll():
            told[output.request_id].append(output)
    return told


@pytest.fixture(scope="module")
def wanted(tiny_checkpoint: Path) -> list[Tensor]:
    """Of each prompt float32 [tokens - 1, vocab_size]: how likely each next token is."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).logits[0, :-1] for prompt in PROMPTS]
    return [row.log_softmax(-1) for row in rows]


def check(found: list[TokenOutput], prompt: list[int], rows: Tensor, num_top: int) -> None:
    scores = [score for output in found for score in output.prompt_logprobs or []]
    assert len(scores) == len(prompt) - 1
    for score, token, row in zip(scores, prompt[1:], rows, strict=True):
        assert abs(score.logprob - float(row[token])) < 1e-4
        assert score.rank == int((row > row[token]).sum()) + 1
        best = row.topk(num_top)
        assert [token_id for token_id, _ in score.top] == best.indices.tolist()
        values = torch.tensor([value for _, value in score.top])
        assert torch.allclose(values, best.values, atol=1e-4)
        if score.rank == 1 and num_top:
            assert score.top[0] == (token, score.logprob), "whoever asks for greed compares the two"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("max_num_tokens", [8, 64, 512])
def test_they_equal_transformers_in_chunks_side_by_side_and_with_a_hot_cache(
    make_engine: EngineMaker, wanted: list[Tensor], tp: int, max_num_tokens: int
) -> None:
    engine = make_engine(quant="none", dtype="float32", tp=tp)
    executor = open_executor(engine, FLOAT32._replace(max_num_tokens=max_num_tokens))
    generate(executor, [Request(9, PROMPTS[0], SamplingParams(2, temperature=0.0))])
    work = [Request(i, prompt, scoring(i)) for i, prompt in enumerate(PROMPTS)]
    work += [Request(7, PROMPTS[0], SamplingParams(1)), Request(8, PROMPTS[0], scoring(2))]
    told = outputs_of(executor, work)
    for number, prompt in enumerate(PROMPTS):
        check(told[number], prompt, wanted[number], number)
    check(told[8], PROMPTS[0], wanted[0], 2)
    assert told[7][-1].num_cached_tokens == 112, "others find the prefix"
    assert told[8][-1].num_cached_tokens == told[0][-1].num_cached_tokens == 0
    assert all(output.prompt_logprobs is None for output in told[7])


def test_a_preempted_sequence_is_told_each_once(
    make_engine: EngineMaker, wanted: list[Tensor]
) -> None:
    engine = make_engine(quant="none", dtype="float32", max_seq_len=256)
    gib = 272 * 2 * 4 * 32 * 4 * 2 / 2**30  # 17 blocks: k and v, heads, head size, float32, layers
    executor = open_executor(engine, FLOAT32._replace(kv_cache_gib=gib))
    told = outputs_of(
        executor, [Request(i, prompt, scoring(2, 100)) for i, prompt in enumerate(PROMPTS)]
    )
    assert executor.stats().num_preemptions > 0
    for number, prompt in enumerate(PROMPTS):
        check(told[number], prompt, wanted[number], 2)
        assert sum(len(output.token_ids) for output in told[number]) == 100


def test_all_come_before_the_first_token_and_none_is_generated_for_max_tokens_zero(
    make_engine: EngineMaker, wanted: list[Tensor]
) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    work = [Request(1, PROMPTS[0], scoring(1, 4)), Request(2, PROMPTS[3], scoring(1, 0))]
    told = outputs_of(executor, [*work, Request(3, PROMPTS[2], scoring(1, 0))])
    first = next(i for i, output in enumerate(told[1]) if output.token_ids)
    assert all(output.prompt_logprobs for output in told[1][: first + 1])
    assert all(output.prompt_logprobs is None for output in told[1][first + 1 :])
    check(told[2], PROMPTS[3], wanted[3], 1)
    assert [output.token_ids for output in told[2]] == [[]] * len(told[2])
    assert told[2][-1].finish_reason is FinishReason.LENGTH
    assert [(o.token_ids, o.finish_reason) for o in told[3]] == [([], FinishReason.LENGTH)]
    assert executor.stats().num_free_kv_blocks == executor.stats().num_kv_blocks


def test_the_logits_of_a_long_prompt_are_never_there_at_once(
    make_engine: EngineMaker, wanted: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginehouse.runtime.torch.executor.ROWS_AT_ONCE", 10)
    engine = make_engine(quant="none", dtype="float32")
    executor = open_executor(engine, FLOAT32._replace(max_num_tokens=512))
    model, sizes = executor.runner.model, []  # type: ignore[attr-defined]
    compute = model.logits
    monkeypatch.setattr(
        model, "logits", lambda hidden: (sizes.append(len(hidden)), compute(hidden))[1]
    )
    check(outputs_of(executor, [Request(0, PROMPTS[0], scoring(2))])[0], PROMPTS[0], wanted[0], 2)
    assert sizes == [*[10] * 11, 6, 1] and logprobs.ROWS_AT_ONCE == 128


def test_deterministic_scores_do_not_depend_on_neighbours(make_engine: EngineMaker) -> None:
    engine = make_engine(quant="int4", dtype="bfloat16")
    executor = open_executor(engine, ExecutorOptions(deterministic=True))
    work = [Request(i, prompt, scoring(2)) for i, prompt in enumerate(PROMPTS)]

    def scores(told: list[TokenOutput]) -> list[object]:
        return [score for output in told for score in output.prompt_logprobs or []]

    together = outputs_of(executor, work)
    for request in work:
        alone = outputs_of(executor, [request])[request.request_id]
        assert scores(alone) == scores(together[request.request_id])


def test_a_prompt_whose_logits_are_not_finite_fails_by_itself(make_engine: EngineMaker) -> None:
    engine = make_engine(quant="none", dtype="float32")
    executor = open_executor(engine, FLOAT32)
    executor.runner.model.embedding[400] = float("nan")  # type: ignore[attr-defined]
    told = outputs_of(
        executor, [Request(0, PROMPTS[0], scoring()), Request(1, PROMPTS[1], scoring())]
    )
    assert told[0][-1].finish_reason is FinishReason.ERROR
    assert "not finite" in (told[0][-1].error or "")
    assert told[1][-1].finish_reason is FinishReason.LENGTH


def test_the_token_that_ends_an_answer_has_its_log_probability(make_engine: EngineMaker) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    [token] = generate(executor, [Request(1, PROMPTS[1], scoring())])[1]
    stops = scoring(1, 4, stop_token_ids=(token,), num_logprobs=1)
    [output] = outputs_of(executor, [Request(2, PROMPTS[1], stops)])[2]
    assert output.stop_token_id == token and output.stop_logprobs is not None
    assert output.stop_logprobs.top == ((token, output.stop_logprobs.logprob),)

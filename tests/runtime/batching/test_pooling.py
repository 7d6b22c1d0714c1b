"""Embeddings against transformers' hidden states in float32, however a prompt is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching.pooling import PooledPrompt
from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.executor import Executor, ExecutorOptions, check_request, generate
from enginehouse.runtime.request import (
    FinishReason,
    Pooling,
    PoolingKind,
    Request,
    SamplingParams,
    TokenOutput,
)
from makers.cpp_compiler import needs_compiler
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = ExecutorOptions(compute_dtype="float32")
LAST, MEAN = Pooling(), Pooling(PoolingKind.MEAN)
PROMPTS = [list(range(300, 417)), [5, 6, 7], [11], [*range(40, 90), *range(20, 90)], [9] * 17]
CLOSE_IN_BF16 = 0.03  # of vectors of length 1: activations, keys and values have 8 bits of mantissa


def pooled(pooling: Pooling) -> SamplingParams:
    return SamplingParams(0, pooling=pooling)


def outputs_of(executor: Executor, work: list[Request]) -> dict[int, TokenOutput]:
    """The last output of each of some requests that run together: of a pooled one the only one."""
    told: dict[int, TokenOutput] = {}
    for request in work:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll():
            of_words = request_of(work, output).sampling.pooling is None
            assert of_words or output.request_id not in told
            told[output.request_id] = output
    return told


def request_of(work: list[Request], output: TokenOutput) -> Request:
    return next(request for request in work if request.request_id == output.request_id)


def vector(output: TokenOutput) -> np.ndarray:
    assert output.embedding is not None and output.finish_reason is FinishReason.STOP
    assert output.token_ids == []
    return np.frombuffer(output.embedding, "<f4")


@pytest.fixture(scope="module")
def states(tiny_checkpoint: Path) -> list[np.ndarray]:
    """Of each prompt float32 [tokens, hidden_size], behind the last norm."""
    model = AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    return [row.numpy() for row in rows]


def wanted(states: np.ndarray, pooling: Pooling) -> np.ndarray:
    made = states[-1] if pooling.kind is PoolingKind.LAST else states.mean(axis=0)
    made = made[: pooling.dimensions]
    return np.asarray(made / np.linalg.norm(made) if pooling.normalize else made)


def kinds(number: int) -> Pooling:
    """Both kinds, cut or whole, of length 1 or as they are."""
    kind = PoolingKind.MEAN if number % 2 else PoolingKind.LAST
    return Pooling(kind, None if number < 2 else 9, normalize=number != 3)


@pytest.mark.parametrize("max_num_tokens", [8, 64, 512])
def test_they_equal_transformers_in_chunks_side_by_side_and_with_a_hot_cache(
    make_engine: EngineMaker, states: list[np.ndarray], max_num_tokens: int
) -> None:
    engine = make_engine(quant="none", dtype="float32", tp=2)
    executor = open_executor(engine, FLOAT32._replace(max_num_tokens=max_num_tokens))
    assert executor.info.embedding_size == states[0].shape[1]
    generate(executor, [Request(99, PROMPTS[0], SamplingParams(2, temperature=0.0))])
    work = [
        Request(4 * number + kind, prompt, pooled(kinds(kind)))
        for number, prompt in enumerate(PROMPTS)
        for kind in range(4)
    ]
    told = outputs_of(executor, [*work, Request(98, PROMPTS[1], SamplingParams(20))])
    for number, of_prompt in enumerate(states):
        for kind in range(4):
            found = vector(told[4 * number + kind])
            assert np.allclose(found, wanted(of_prompt, kinds(kind)), atol=1e-4)
    assert told[0].num_cached_tokens == 112, "the last token's state needs the others' keys alone"
    assert told[1].num_cached_tokens == 0, "what is found in a cache has no hidden state"
    assert executor.stats().num_free_kv_blocks == executor.stats().num_kv_blocks


def test_a_preempted_prompt_counts_each_token_once(
    make_engine: EngineMaker, states: list[np.ndarray]
) -> None:
    """While it is computed, two tokens in an iteration, another answer wants its room."""
    engine = make_engine(quant="none", dtype="float32", max_seq_len=256)
    gib = 160 * 2 * 4 * 32 * 4 * 2 / 2**30  # 10 blocks: k and v, heads, head size, float32, layers
    options = FLOAT32._replace(
        max_seq_len=160, kv_cache_gib=gib, max_batch_size=2, max_num_tokens=3
    )
    executor = open_executor(engine, options)
    answer = SamplingParams(120, temperature=0.0, ignore_eos=True)
    work = [Request(1, PROMPTS[1], answer), Request(2, PROMPTS[0], pooled(MEAN), priority=1)]
    told = outputs_of(executor, work)
    assert executor.stats().num_preemptions > 0
    assert np.allclose(vector(told[2]), wanted(states[0], MEAN), atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("pooling", [LAST, MEAN], ids=["last", "mean"])
def test_the_kernels_give_them_too_and_the_same_bits_however_a_prompt_is_cut(
    make_engine: EngineMaker, states: list[np.ndarray], pooling: Pooling
) -> None:
    engine = make_engine(
        quant="none", dtype="bfloat16", backend="cpu", until="compile", cpu_activations="bf16"
    )
    work = [Request(i, prompt, pooled(pooling)) for i, prompt in enumerate(PROMPTS)]
    found = []
    for max_num_tokens in (16, 512):
        options = ExecutorOptions(max_num_tokens=max_num_tokens, num_threads=1)
        executor = open_executor(engine, options)
        found.append([vector(told) for told in outputs_of(executor, work).values()])
        executor.close()
    for of_prompt, some, whole in zip(states, *found, strict=True):
        assert some.tobytes() == whole.tobytes()
        assert np.abs(whole - wanted(of_prompt, pooling)).max() < CLOSE_IN_BF16


def test_a_prompt_whose_hidden_states_are_not_finite_fails_by_itself(
    make_engine: EngineMaker,
) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    executor.runner.model.embedding[400] = float("nan")  # type: ignore[attr-defined]
    work = [Request(i, PROMPTS[i], pooled(MEAN)) for i in range(2)]
    told = outputs_of(executor, work)
    assert (told[0].finish_reason, told[0].embedding) == (FinishReason.ERROR, None)
    assert told[0].error == "the model's hidden states are not finite"
    assert told[1].embedding is not None


def test_an_output_layer_is_not_asked_for_what_is_not_answered(make_engine: EngineMaker) -> None:
    executor = open_executor(make_engine(quant="none", dtype="float32"), FLOAT32)
    model = executor.runner.model  # type: ignore[attr-defined]
    model.logits = lambda hidden: pytest.fail("logits were made")
    assert vector(outputs_of(executor, [Request(1, PROMPTS[0], pooled(LAST))])[1]).any()


def test_a_vector_of_zeros_has_no_direction_and_stays() -> None:
    prompt = PooledPrompt(LAST, 3)
    assert (list(prompt.wanted(0, 2)), list(prompt.wanted(2, 3))) == ([], [2])
    prompt.add(np.zeros((1, 4), np.float32))
    assert prompt.vector().tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("sampling", "size", "param", "said"),
    [
        (pooled(LAST), 0, None, "--backend cpu or torch"),
        (pooled(Pooling(dimensions=9)), 8, "dimensions", "wanted 1 to 8"),
        (SamplingParams(1, pooling=LAST), 8, None, "tokens or their logprobs beside it"),
        (SamplingParams(0, num_prompt_logprobs=1, pooling=MEAN), 8, None, "beside it"),
    ],
)
def test_what_no_engine_gives_is_refused(
    sampling: SamplingParams, size: int, param: str | None, said: str
) -> None:
    request, limits = Request(1, [1], sampling), {"max_seq_len": 9, "vocab_size": 9}
    with pytest.raises(RequestError, match=said) as caught:
        check_request(request, longest=8, embedding_size=size, **limits)
    assert caught.value.param == param

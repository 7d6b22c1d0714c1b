"""What TensorRT-LLM is told of a request, field by field, and what it answers, made ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doubles.trtllm_double import install_double
from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.grammar.json_schema import exact_schema
from enginehouse.runtime.grammar.support import TENSORRT_LLM
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from enginehouse.runtime.tensorrt_llm.output import (
    bias_tensor,
    failed_output,
    prompt_logprobs,
    token_output,
)
from enginehouse.runtime.tensorrt_llm.sampling import check_for_trtllm, sampling_fields

SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}}}'
CHOSEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LIMITS: dict[str, Any] = {
    "max_seq_len": 100,
    "max_input_len": 100,
    "vocab_size": 512,
    "context_logits": False,
}
COMMON = {"detokenize": False, "end_id": 2, "pad_id": 2, "seed": 7, "stop_token_ids": [2, 0]}


@pytest.fixture(scope="module", autouse=True)
def double() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        yield


def fields_of(
    *, prompt: int = 3, max_tokens: int = 10, seed: int | None = 7, **sampling: Any
) -> Any:
    """The arguments of SamplingParams, which the double has accepted."""
    from tensorrt_llm import SamplingParams as Accepting
    from tensorrt_llm.llmapi import GuidedDecodingParams

    request = Request(1, [5] * prompt, SamplingParams(max_tokens, seed=seed, **sampling))
    fields = sampling_fields(request, max_seq_len=100, eos_token_ids=(2, 0))
    made = dict(fields)
    if "guided_decoding" in made:
        made["guided_decoding"] = GuidedDecodingParams(**made["guided_decoding"])
    if "embedding_bias" in made:
        made["embedding_bias"] = bias_tensor(made["embedding_bias"], 512)
    Accepting(**made)
    return fields


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, CHOSEN),
        ({"temperature": 0.7}, {**CHOSEN, "temperature": 0.7}),
        (
            {"top_p": 0.9, "top_k": 40, "min_p": 0.1},
            {**CHOSEN, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
        ),
        ({"top_k": -1}, CHOSEN),
        ({"temperature": 0.0}, {"top_k": 1}),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 9, "min_p": 0.2}, {"top_k": 1}),
        ({"repetition_penalty": 1.2}, {**CHOSEN, "repetition_penalty": 1.2}),
        (
            {"presence_penalty": 0.5},
            {
                **CHOSEN,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.0,
                "prompt_ignore_length": 3,
            },
        ),
        (
            {"frequency_penalty": -0.5},
            {
                **CHOSEN,
                "presence_penalty": 0.0,
                "frequency_penalty": -0.5,
                "prompt_ignore_length": 3,
            },
        ),
        ({"stop_token_ids": (9, 2)}, {**CHOSEN, "stop_token_ids": [2, 0, 9]}),
        ({"logit_bias": ((4, -100.0),)}, {**CHOSEN, "embedding_bias": ((4, -100.0),)}),
        ({"num_logprobs": 5}, {**CHOSEN, "logprobs": 5}),
        ({"num_logprobs": 0}, {**CHOSEN, "logprobs": 1}),
        ({"num_prompt_logprobs": 4}, {**CHOSEN, "return_context_logits": True}),
        ({"min_tokens": 4}, {**CHOSEN, "min_tokens": 4}),
        ({"min_tokens": 1}, CHOSEN),
    ],
)
def test_each_field_is_said_as_the_contract_has_it(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert fields_of(**ours) == {**COMMON, "max_tokens": 10, **theirs}


def test_ignore_eos_leaves_the_senders_stop_tokens_only() -> None:
    fields = fields_of(ignore_eos=True, stop_token_ids=(9,))
    assert fields["ignore_eos"] is True and fields["stop_token_ids"] == [9]
    assert "stop_token_ids" not in fields_of(ignore_eos=True)


@pytest.mark.parametrize(("prompt", "asked", "given"), [(3, 97, 97), (3, 98, 97), (90, 50, 10)])
def test_max_tokens_is_clamped_to_the_context(prompt: int, asked: int, given: int) -> None:
    assert fields_of(prompt=prompt, max_tokens=asked)["max_tokens"] == given


def test_a_seed_is_given_or_drawn_and_never_the_default() -> None:
    drawn = {fields_of(seed=None)["seed"] for _ in range(50)}
    assert len(drawn) == 50 and all(0 <= seed < 2**63 for seed in drawn)
    assert max(drawn) > 2**56, "drawn from all 63 bits"
    assert fields_of(seed=0)["seed"] == 0
    assert 0 <= fields_of(seed=-1)["seed"] < 2**63


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (ConstraintKind.JSON_OBJECT, "", {"json": '{"type": "object"}'}),
        (ConstraintKind.REGEX, r"\d+", {"regex": r"[\x30-\x39]+"}),
        (ConstraintKind.EBNF, 'root ::= "a"', {"grammar": 'root ::= "a"'}),
        (ConstraintKind.CHOICE, '["yes", "n\\"o"]', {"grammar": 'root ::= "yes" | "n\\"o"'}),
    ],
)
def test_a_constraint_becomes_one_guide(
    kind: ConstraintKind, value: str, told: dict[str, Any]
) -> None:
    assert fields_of(constraint=Constraint(kind, value))["guided_decoding"] == told


def test_a_schema_and_a_structural_tag_arrive_exactly() -> None:
    told = fields_of(constraint=Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA))["guided_decoding"]
    assert list(told) == ["json"] and json.loads(told["json"]) == exact_schema(
        json.loads(SCHEMA), TENSORRT_LLM
    )
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    constraint = Constraint(ConstraintKind.STRUCTURAL_TAG, json.dumps(tag))
    told = fields_of(constraint=constraint)["guided_decoding"]
    assert list(told) == ["structural_tag"] and json.loads(told["structural_tag"]) == tag


@pytest.mark.parametrize(
    ("prompt", "sampling", "param", "message"),
    [
        ([], {}, "messages", "the prompt has 0 tokens; wanted 1 to 99"),
        ([5] * 100, {}, "messages", "the prompt has 100 tokens; wanted 1 to 99"),
        ([512], {}, None, "outside the vocabulary of 512"),
        ([5], {"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ([5], {"min_p": 1.5}, "min_p", "min_p is 1.5; wanted 0 to 1"),
        ([5], {"logit_bias": ((512, 1.0),)}, "logit_bias", "outside the vocabulary"),
        ([5], {"min_tokens": 5}, "min_tokens", "2 tokens end this sequence"),
    ],
)
def test_what_cannot_run_is_refused_by_its_name(
    prompt: list[int], sampling: dict[str, Any], param: str | None, message: str
) -> None:
    request = Request(1, prompt, SamplingParams(**{"max_tokens": 10, **sampling}))
    with pytest.raises(RequestError, match=message) as caught:
        check_for_trtllm(request, **LIMITS, num_eos=2)
    assert caught.value.param == param


def test_min_tokens_is_taken_where_one_token_at_most_ends_a_sequence() -> None:
    check_for_trtllm(Request(1, [5], SamplingParams(9, min_tokens=5)), **LIMITS, num_eos=1)
    free = SamplingParams(9, min_tokens=5, ignore_eos=True)
    check_for_trtllm(Request(1, [5], free), **LIMITS, num_eos=3)


def test_a_prompt_is_scored_where_the_engine_gives_its_logits_and_they_fit() -> None:
    request = Request(1, [5] * 50, SamplingParams(1, num_prompt_logprobs=0))
    check_for_trtllm(request, **{**LIMITS, "context_logits": True}, num_eos=1)
    with pytest.raises(RequestError, match="was built without gather_context_logits") as caught:
        check_for_trtllm(request, **LIMITS, num_eos=1)
    assert caught.value.param == "prompt_logprobs"
    huge = {**LIMITS, "context_logits": True, "vocab_size": 2**24}
    with pytest.raises(RequestError, match="has 50 tokens; .* takes at most 32 here"):
        check_for_trtllm(request, **huge, num_eos=1)


def answer(token_ids: list[int], finish: str | None, stop: int | None = None, **more: Any) -> Any:
    completion = SimpleNamespace(
        token_ids_diff=token_ids, finish_reason=finish, stop_reason=stop, logprobs_diff=[], **more
    )
    return SimpleNamespace(outputs=[completion], cached_tokens=16)


@pytest.mark.parametrize(
    ("result", "tokens", "finish", "stop"),
    [
        (answer([5, 6], None), [5, 6], None, None),
        (answer([5, 2], "stop"), [5], FinishReason.STOP, 2),  # end_id among the tokens
        (answer([5], "stop"), [5], FinishReason.STOP, 2),  # end_id taken off
        (answer([5], "stop", 9), [5], FinishReason.STOP, 9),
        (answer([], "stop", 0), [], FinishReason.STOP, 0),
        (answer([5], "length"), [5], FinishReason.LENGTH, None),
        (answer([], "cancelled"), [], FinishReason.CANCELLED, None),
    ],
)
def test_an_answer_is_translated(
    result: Any, tokens: list[int], finish: FinishReason | None, stop: int | None
) -> None:
    request = Request(3, [5], SamplingParams(9, stop_token_ids=(9,)))
    output = token_output(request, result, (2, 0))
    assert (output.request_id, output.token_ids, output.finish_reason) == (3, tokens, finish)
    assert output.stop_token_id == stop and output.num_cached_tokens == 16
    assert output.logprobs is None and output.error is None


def test_a_timeout_of_the_engine_is_an_error() -> None:
    output = token_output(Request(3, [5], SamplingParams(9)), answer([], "timeout"), (2,))
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "TensorRT-LLM ended the sequence: timeout"


def test_logprobs_are_the_chosen_token_and_the_likeliest_in_order() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 1.0, 0.0, 2.0]]).log_softmax(-1)
    chosen, result = [3, 2], answer([3, 2, 9], "stop")
    entries = []
    for row, token in zip(logits, chosen, strict=True):
        kept = {*row.topk(2).indices.tolist(), token}
        entries.append({t: SimpleNamespace(logprob=float(row[t])) for t in sorted(kept)})
    result.outputs[0].logprobs_diff = [*entries, {9: SimpleNamespace(logprob=-1.0)}]
    sampling = SamplingParams(9, num_logprobs=2, stop_token_ids=(9,))
    output = token_output(Request(3, [5], sampling), result, (1,))
    assert output.token_ids == chosen
    assert output.logprobs == [
        TokenLogprobs(
            float(row[token]), tuple((int(i), float(row[i])) for i in row.topk(2).indices)
        )
        for row, token in zip(logits, chosen, strict=True)
    ]
    assert output.stop_logprobs == TokenLogprobs(-1.0, ((9, -1.0),))


def test_logits_of_a_part_of_the_prompt_score_nothing() -> None:
    """As of a prefix that was found in the cache."""
    request = Request(3, [5, 6, 7], SamplingParams(1, num_prompt_logprobs=1))
    for cached, rows in ((1, 3), (0, 2)):
        result = SimpleNamespace(context_logits=torch.zeros(rows, 8), cached_tokens=cached)
        with pytest.raises(EngineError, match="the logits of 2 of the prompt's 3 tokens"):
            prompt_logprobs(request, result, 8)
    with pytest.raises(EngineError, match="the logits of 0 of"):
        prompt_logprobs(request, SimpleNamespace(context_logits=None), 8)


def test_of_a_request_for_no_tokens_none_is_told() -> None:
    request = Request(3, [5], SamplingParams(0, stop_token_ids=(9,)))
    for result in (answer([5], "length"), answer([], "stop", 9), answer([5, 2], "stop")):
        output = token_output(request, result, (2,))
        assert (output.token_ids, output.finish_reason) == ([], FinishReason.LENGTH)
    assert token_output(request, answer([], "timeout"), (2,)).finish_reason is FinishReason.ERROR


def test_a_constraint_that_does_not_compile_is_its_senders_fault() -> None:
    constraint = Constraint(ConstraintKind.REGEX, "(", "guided_regex")
    request = Request(3, [5], SamplingParams(9, constraint=constraint))
    output = failed_output(request, RuntimeError("Grammar matcher: unbalanced"))
    assert output.refusal is not None and output.refusal.param == "guided_regex"
    assert "unbalanced" in output.refusal.message
    plain = failed_output(Request(3, [5], SamplingParams(9)), RuntimeError("grammar"))
    assert plain.refusal is None and plain.finish_reason is FinishReason.ERROR
    assert failed_output(request, RuntimeError("CUDA out of memory")).refusal is None

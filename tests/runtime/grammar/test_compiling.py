"""The process that compiles grammars, when it is late, slow, killed, or asked for what harms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.grammar.compiler import GrammarCompiler
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
)
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.constrained import OPTIONS, Answer, constrained, open_torch, run, words
from makers.schemas import ODD, as_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_constraint_holds_through_chunks_preemption_bias_and_other_stop_tokens(
    engine: Path, tokenizer: Tokenizer
) -> None:
    schema = json.dumps({"type": "string", "pattern": "^[ -~]{110,120}$"})
    quote = tokenizer.token_to_id('"')
    letter = tokenizer.token_to_id("a")
    params = {
        "constraint": Constraint(ConstraintKind.JSON_SCHEMA, schema),
        "stop_token_ids": (letter,),
        "logit_bias": ((quote, 5.0),),
        "min_tokens": 500,
        "num_logprobs": 2,
        "ignore_eos": True,
        "repetition_penalty": 1.1,
    }
    work = [
        Request(i, list(range(40, 140)), SamplingParams(150, seed=i, **params))  # type: ignore[arg-type]
        for i in range(4)
    ]
    roomy = open_torch(engine, OPTIONS._replace(max_seq_len=256))
    wanted = {i: a.token_ids for i, a in run(roomy, work).items()}
    gib = 17 * 16 * 2 * 4 * 32 * 4 * 2 / 2**30
    cramped = open_torch(engine, OPTIONS._replace(max_seq_len=256, kv_cache_gib=gib))
    answers = run(cramped, work)
    assert cramped.stats().num_preemptions > 0
    for i, answer in answers.items():
        assert answer.last.finish_reason is FinishReason.STOP, answer.last
        assert answer.last.stop_token_id is not None
        text = json.loads(words(tokenizer, answer.token_ids))
        assert 110 <= len(text) <= 120
        assert answer.token_ids == wanted[i]
        for output in answer.outputs[:-1]:
            assert output.logprobs is not None and len(output.logprobs[0].top) == 2
    roomy.close()
    cramped.close()


def test_hostile_schemas_are_compiled_or_refused_and_harm_nobody(
    engine: Path, tokenizer: Tokenizer
) -> None:
    executor = open_torch(engine, OPTIONS._replace(grammar_timeout_s=1.0))
    healthy = Request(1000, [5, 6, 7], SamplingParams(400, temperature=0.0, ignore_eos=True))
    alone = run(executor, [healthy])[1000].token_ids
    answers: dict[int, Answer] = {1000: Answer()}
    names = list(ODD)
    executor.submit(healthy)
    for i, name in enumerate(names):
        constraint = Constraint(ConstraintKind.JSON_SCHEMA, as_text(ODD[name]), "p")
        try:
            executor.submit(Request(i, [4], SamplingParams(20, constraint=constraint, seed=1)))
        except RequestError as error:
            assert (error.param, error.code) == ("p", "invalid_value")
        else:
            answers[i] = Answer()
    assert executor.stats().num_waiting >= len(answers) - 1 > 30, "none of them is ready at once"
    while executor.busy:
        for output in executor.poll(0.1):
            answers[output.request_id].outputs.append(output)
            answers[output.request_id].token_ids += output.token_ids
    assert answers[1000].token_ids == alone
    for i, name in enumerate(names):
        if i not in answers:
            continue
        last = answers[i].last
        if last.finish_reason is FinishReason.STOP:
            text = words(tokenizer, answers[i].token_ids)
            Draft202012Validator(ODD[name]).validate(json.loads(text))
        elif last.finish_reason is not FinishReason.LENGTH:
            assert last.refusal is not None, (name, last)
    executor.close()


def test_a_grammar_that_is_not_compiled_in_time_is_killed_and_refused(engine: Path) -> None:
    compiler = GrammarCompiler(engine, 512, (2, 0), timeout_s=0.05)
    slow = Constraint(ConstraintKind.JSON_SCHEMA, as_text(ODD["big_counts"]), "p")
    with pytest.raises(RequestError, match=r"takes 0\.05 seconds to compile") as caught:
        compiler.compile(slow).result(60)
    assert (caught.value.param, caught.value.code) == ("p", "invalid_value")
    compiler.timeout_s = 10.0
    compiler.compile(Constraint(ConstraintKind.REGEX, "a")).result(60)
    compiler.close()


def test_a_grammar_that_grows_slow_is_given_up(executor: TorchExecutor) -> None:
    params = constrained(
        ConstraintKind.EBNF, "root ::= root root | [a-c]", 1500, ignore_eos=True, seed=3
    )
    answer = run(executor, [Request(1, [4], params)])[1]
    assert answer.last.refusal is not None, len(answer.token_ids)
    assert "too long to follow" in answer.last.refusal.message


def test_a_grammar_that_is_waited_for_by_nobody_is_given_up(engine: Path) -> None:
    executor = open_torch(engine)
    for i in range(20):
        executor.submit(Request(i, [4], constrained(ConstraintKind.REGEX, f"a{{{i + 1}}}")))
    assert executor.stats().num_waiting == 20
    for i in range(20):
        executor.cancel(i)
    assert not executor.busy and executor.poll() == []
    assert run(executor, [Request(50, [4], constrained(ConstraintKind.REGEX, "b+c"))])[50].outputs
    executor.close()


def test_equal_constraints_are_compiled_once(executor: TorchExecutor) -> None:
    regex = Constraint(ConstraintKind.REGEX, "abc[0-9]")
    first = executor.grammars.compile(regex)
    assert executor.grammars.compile(regex) is first
    assert executor.grammars.compile(Constraint(ConstraintKind.REGEX, "abc[0-8]")) is not first
    first.result(60)
    assert executor.grammars.compile(regex) is first


def test_the_process_is_started_again_when_it_was_killed(engine: Path) -> None:
    compiler = GrammarCompiler(engine, 512, (2, 0))
    compiler.compile(Constraint(ConstraintKind.REGEX, "a")).result(60)
    child = compiler._child
    assert child is not None
    child._process.kill()
    child._process.wait()
    compiler.compile(Constraint(ConstraintKind.REGEX, "b")).result(60)
    compiler.close()


def test_the_process_can_be_started_with_the_engine(engine: Path) -> None:
    executor = open_torch(engine, OPTIONS._replace(grammars_at_once=True))
    executor.grammars._threads.shutdown(wait=True)
    child = executor.grammars._child
    assert child is not None and not child.gone
    executor.close()
    assert child.gone


def test_without_a_tokenizer_a_constraint_is_refused(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path, 512, (2,))
    with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
        compiler.compile(Constraint(ConstraintKind.JSON_OBJECT, ""))
    compiler.close()


def test_a_compiler_that_was_closed_starts_no_process(engine: Path) -> None:
    """Its thread may still have been importing what a process takes."""
    compiler = GrammarCompiler(engine, 512, (2, 0))
    compiler.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        compiler._running()

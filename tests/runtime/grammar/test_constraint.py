"""Constraints followed by a tiny model of random weights: whatever it says, it validates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.grammar.compiler import GrammarCompiler
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
)
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import EngineMaker
from makers.schemas import BAD, GOOD, NEWER, ODD, as_text

OPTIONS = ExecutorOptions(compute_dtype="float32", max_batch_size=8)
pytestmark = pytest.mark.usefixtures("one_thread")


class Answer:
    """What one request gave in the end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[TokenOutput] = []

    @property
    def last(self) -> TokenOutput:
        return self.outputs[-1]


def run(executor: TorchExecutor, requests: list[Request]) -> dict[int, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll(0.1):
            answers[output.request_id].outputs.append(output)
            answers[output.request_id].token_ids += output.token_ids
    return answers


def open_torch(engine: Path, options: ExecutorOptions = OPTIONS) -> TorchExecutor:
    executor = open_executor(engine, options)
    assert isinstance(executor, TorchExecutor)
    return executor


@pytest.fixture(scope="module")
def engine(make_engine: EngineMaker) -> Path:
    return make_engine(quant="none", dtype="float32")


@pytest.fixture(scope="module")
def executor(engine: Path) -> Iterator[TorchExecutor]:
    running = open_torch(engine)
    yield running
    running.close()


@pytest.fixture(scope="module")
def tokenizer(engine: Path) -> Tokenizer:
    return Tokenizer.from_file(str(engine / "tokenizer.json"))


def constrained(
    kind: ConstraintKind, value: str, max_tokens: int = 60, **params: Any
) -> SamplingParams:
    return SamplingParams(max_tokens, constraint=Constraint(kind, value), **params)


def words(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize("name", GOOD)
def test_every_finished_answer_validates_against_its_schema(
    executor: TorchExecutor, tokenizer: Tokenizer, name: str
) -> None:
    schema = GOOD[name]
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    params = [
        constrained(ConstraintKind.JSON_SCHEMA, json.dumps(schema), seed=seed, num_logprobs=1)
        for seed in range(8)
    ]
    requests = [Request(i, [5, 6, 7], p) for i, p in enumerate(params)]
    if name in NEWER and not installed().is_newest:
        with pytest.raises(RequestError, match=r"needs xgrammar 0\.2\.8 or later"):
            executor.submit(requests[0])
        return
    answers = run(executor, requests)
    finished = 0
    for answer in answers.values():
        assert answer.last.refusal is None, answer.last.error
        if answer.last.finish_reason is FinishReason.STOP:
            finished += 1
            text = words(tokenizer, answer.token_ids)
            validator.validate(json.loads(text, object_pairs_hook=unique))
    assert finished, "no answer came to an end"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Objects in which no name is repeated, of those that may not repeat any."""
    return dict(pairs)


KINDS: dict[str, tuple[ConstraintKind, str, Any]] = {
    "object": (ConstraintKind.JSON_OBJECT, "", lambda text: isinstance(json.loads(text), dict)),
    "regex": (
        ConstraintKind.REGEX,
        r"(\d{3}-[a-f]+|x[ -~]y){1,3}",
        lambda text: re.fullmatch(r"(\d{3}-[a-f]+|x[ -~]y){1,3}", text),
    ),
    "ebnf": (
        ConstraintKind.EBNF,
        'root ::= "(" root ")" | [0-9]+ (op [0-9]+)*\nop ::= "+" | "*"',
        lambda text: (
            re.fullmatch(r"\(*\d+([+*]\d+)*\)*", text) and text.count("(") == text.count(")")
        ),
    ),
    "choice": (
        ConstraintKind.CHOICE,
        json.dumps(["yes", "no", 'say "\\n"\n', "\u00fcber \U0001f642"]),
        lambda text: text in ["yes", "no", 'say "\\n"\n', "\u00fcber \U0001f642"],
    ),
    "structural_tag": (
        ConstraintKind.STRUCTURAL_TAG,
        json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "tag",
                    "begin": "<call>",
                    "content": {"type": "json_schema", "json_schema": GOOD["object"]},
                    "end": "</call>",
                },
            }
        ),
        lambda text: Draft202012Validator(GOOD["object"]).is_valid(
            json.loads(text.removeprefix("<call>").removesuffix("</call>"))
        ),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_constraint_is_followed(
    executor: TorchExecutor, tokenizer: Tokenizer, name: str
) -> None:
    kind, value, holds = KINDS[name]
    params = [constrained(kind, value, 150, seed=seed) for seed in range(8)]
    answers = run(executor, [Request(i, [9, 4], p) for i, p in enumerate(params)])
    texts = [
        words(tokenizer, a.token_ids)
        for a in answers.values()
        if a.last.finish_reason is FinishReason.STOP
    ]
    assert texts, [a.last for a in answers.values()]
    for text in texts:
        assert holds(text), text


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
        for i in range(6)
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


def test_max_tokens_cuts_an_answer_with_length(executor: TorchExecutor) -> None:
    params = constrained(ConstraintKind.REGEX, "[a-z]{50}", 5)
    assert run(executor, [Request(1, [3], params)])[1].last.finish_reason is FinishReason.LENGTH


def test_no_special_token_is_ever_allowed(executor: TorchExecutor, tokenizer: Tokenizer) -> None:
    specials = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    bias = tuple((i, 90.0) for i in specials)
    params = constrained(ConstraintKind.REGEX, "[ac-z]{12}", 40, logit_bias=bias)
    answer = run(executor, [Request(1, [3], params)])[1]
    assert answer.last.finish_reason is FinishReason.STOP
    assert not set(answer.token_ids) & set(specials)
    assert len(words(tokenizer, answer.token_ids)) == 12


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_enforced_is_refused_in_one_sentence(
    executor: TorchExecutor, name: str
) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, as_text(BAD[name]), "response_format.x")
    request = Request(1, [3], SamplingParams(5, constraint=constraint))
    try:
        executor.submit(request)
    except RequestError as error:
        refused = (error.param, error.code, error.message)
    else:
        output = next(o for _ in range(1000) for o in executor.poll(0.1))
        assert output.finish_reason is FinishReason.ERROR and output.refusal is not None, output
        refused = (output.refusal.param, output.refusal.code, output.refusal.message)
    assert refused[:2] == ("response_format.x", "invalid_value")
    assert refused[2] and "\n" not in refused[2] and len(refused[2]) < 400
    assert not executor.busy


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ConstraintKind.REGEX, ""),
        (ConstraintKind.REGEX, "(a"),
        (ConstraintKind.REGEX, "(?=a)b"),
        (ConstraintKind.REGEX, "x" * 70_000),
        (ConstraintKind.EBNF, 'start ::= "a"'),
        (ConstraintKind.EBNF, "root ::= root"),
        (ConstraintKind.EBNF, "root ::= " + "(" * 20_000),
        (ConstraintKind.CHOICE, "[]"),
        (ConstraintKind.CHOICE, '["a", 1]'),
        (ConstraintKind.CHOICE, "yes"),
        (ConstraintKind.STRUCTURAL_TAG, "{}"),
        (ConstraintKind.STRUCTURAL_TAG, '{"type": "structural_tag", "format": {"type": "x"}}'),
    ],
)
def test_a_constraint_of_another_kind_that_makes_no_sense_is_refused(
    executor: TorchExecutor, kind: ConstraintKind, value: str
) -> None:
    with pytest.raises(RequestError) as caught:
        executor.grammars.compile(Constraint(kind, value, "p")).result(60)
    assert (caught.value.param, caught.value.code) == ("p", "invalid_value")


def test_hostile_schemas_are_compiled_or_refused_and_harm_nobody(
    engine: Path, tokenizer: Tokenizer
) -> None:
    executor = open_torch(engine, OPTIONS._replace(grammar_timeout_s=3.0))
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


def test_a_refusal_names_the_keyword_and_its_path() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(RequestError, match=r"schema\.properties\.a: the keyword 'uniqueItems'"):
        check(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema)), installed())


def test_a_compiler_that_was_closed_starts_no_process(engine: Path) -> None:
    """Its thread may still have been importing what a process takes."""
    compiler = GrammarCompiler(engine, 512, (2, 0))
    compiler.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        compiler._running()

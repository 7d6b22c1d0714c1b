"""Constraints followed by a tiny model of random weights: whatever it says, it validates."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
)
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.constrained import constrained, run, words
from makers.schemas import BAD, GOOD, NEWER, as_text

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_refusal_names_the_keyword_and_its_path() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(RequestError, match=r"schema\.properties\.a: the keyword 'uniqueItems'"):
        check(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema)), installed())

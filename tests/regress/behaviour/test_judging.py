"""What two conversations come to."""

from __future__ import annotations

import pytest

from enginehouse.regress.behaviour.judging import (
    TEMPLATE,
    CaseResult,
    Conversation,
    Exchange,
    judge_behaviour,
)
from enginehouse.regress.findings import Finding, Status

FAILED = CaseResult("stop", False, "found a; wanted b")
PASSED = CaseResult("stop", True, "")
SKIPPED = CaseResult("stop", True, "not asked: this engine cannot")


def judged(
    old: list[CaseResult | Exchange] | None, new: CaseResult | Exchange, is_ours: bool = False
) -> Finding:
    [finding] = judge_behaviour(None if old is None else said(*old), said(new), is_ours=is_ours)
    return finding


def said(*rows: CaseResult | Exchange) -> Conversation:
    return Conversation(
        [row for row in rows if isinstance(row, CaseResult)],
        [row for row in rows if isinstance(row, Exchange)],
    )


@pytest.mark.parametrize("old", [None, [], [FAILED], [PASSED], [SKIPPED]])
def test_our_own_server_has_to_pass_whatever_it_did_before(
    old: list[CaseResult | Exchange] | None,
) -> None:
    found = judged(old, FAILED, is_ours=True)
    assert found == Finding("behaviour", "stop", Status.REGRESSED, "found a; wanted b")
    assert judged(old, PASSED, is_ours=True).status is Status.PASSED


def test_another_server_has_to_do_what_it_did() -> None:
    assert judged([PASSED], FAILED).status is Status.REGRESSED
    for old in (None, [], [FAILED], [SKIPPED]):
        found = judged(old, FAILED)
        assert (found.status, found.sentence) == (Status.NOT_JUDGED, FAILED.said)
    assert judged([FAILED], PASSED).status is Status.PASSED


def test_what_could_not_be_asked_is_told_and_not_judged() -> None:
    for is_ours in (True, False):
        for old in (None, [], [SKIPPED]):
            found = judged(old, SKIPPED, is_ours)
            assert (found.status, found.sentence) == (Status.NOT_JUDGED, SKIPPED.said)
        found = judged([PASSED], SKIPPED, is_ours)
        assert found.status is Status.CANNOT_TELL and SKIPPED.said in found.sentence


def test_a_field_that_is_gone_is_a_regression_and_a_new_one_is_told() -> None:
    old = Exchange("chat", ["id: string", "usage: object", "usage.cost: number"])
    new = Exchange("chat", ["id: string", "usage: object", "usage.price: number"])
    found = judged([old], new)
    assert (found.check, found.status) == ("shape.chat", Status.REGRESSED)
    assert found.sentence == "usage.cost is gone; new: usage.price"
    more = judged([Exchange("chat", ["id: string"])], old)
    assert (more.status, more.sentence) == (Status.PASSED, "new: usage, usage.cost")


def test_an_answer_that_is_not_there_any_more_is_a_regression() -> None:
    [found] = judge_behaviour(said(Exchange("models", ["id: string"])), said(), is_ours=False)
    assert (found.check, found.status) == ("shape.models", Status.REGRESSED)
    assert judged([], Exchange("models", ["id: string"])).status is Status.NOT_JUDGED


def test_a_new_line_in_a_prompt_is_a_regression() -> None:
    old = Exchange(TEMPLATE, ['question 0: "a\\n"', 'question 1: "b"'])
    assert judged([old], old).status is Status.PASSED
    found = judged([old], Exchange(TEMPLATE, [old.shape[0], 'question 1: "\\n"', "more"]))
    assert (found.check, found.status) == (TEMPLATE, Status.REGRESSED)
    assert 'question 1: "\\n"' in found.sentence and old.shape[1] in found.sentence
    shorter = judged([old], Exchange(TEMPLATE, old.shape[:1]))
    assert shorter.status is Status.REGRESSED and "no more" in shorter.sentence


def test_another_sources_template_may_be_another() -> None:
    old, new = (Exchange(TEMPLATE, [f'question 0: "{word}"']) for word in ("a", "b"))
    [found] = judge_behaviour(
        Conversation([], [old]), Conversation([], [new]), is_ours=True, other_template=True
    )
    assert found.status is Status.NOT_JUDGED

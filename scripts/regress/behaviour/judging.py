"""Two conversations -> findings: what fails that has to pass, what of an answer is gone.

Knows no server and no case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest

import msgspec

from enginehouse.regress.behaviour.shapes import compare_shapes
from enginehouse.regress.findings import Figure, Finding, Status

GROUP = "behaviour"
TEMPLATE = "template"


class CaseResult(msgspec.Struct, frozen=True, tag="case"):
    """said: one sentence of what was found and wanted when it failed, and of a case that passed why
    it could not be asked; else "".
    """

    name: str
    passed: bool
    said: str


class Exchange(msgspec.Struct, frozen=True, tag="exchange"):
    """shape: sorted "path: type" lines of the answer's JSON, of a stream's events the union; of
    TEMPLATE, the lines that the server's chat template makes of a few conversations.
    """

    name: str
    shape: list[str]


class Conversation(msgspec.Struct, frozen=True):
    """What one server did when it was asked everything once."""

    results: list[CaseResult]
    exchanges: list[Exchange]


def judge_behaviour(
    old: Conversation | None,
    new: Conversation,
    *,
    is_ours: bool,
    other_template: bool = False,
) -> list[Finding]:
    """A finding for each case and each exchange of `new`, and for what only `old` has.

    What our own server fails is a regression, whatever it did before. Another server need not do
    all that is asked: of it only what it did before. other_template: the chat template may be
    another one, as the engine is of another source.
    """
    passed = {case.name for case in old.results if case.passed and not case.said} if old else set()
    before = {exchange.name: exchange.shape for exchange in old.exchanges} if old else {}
    findings = [_of_case(case, case.name in passed, is_ours) for case in new.results]
    return findings + list(_of_exchanges(before, new, other_template))


def _of_case(case: CaseResult, passed_before: bool, is_ours: bool) -> Finding:
    sentence = case.said or "as the API promises"
    if not case.passed:
        status = Status.REGRESSED if is_ours or passed_before else Status.NOT_JUDGED
    elif case.said and passed_before:
        status, sentence = Status.CANNOT_TELL, f"it passed before, and is not asked now: {sentence}"
    else:
        status = Status.NOT_JUDGED if case.said else Status.PASSED
    return Finding(GROUP, case.name, status, sentence)


def _of_exchanges(
    before: Mapping[str, list[str]], new: Conversation, other_template: bool
) -> Iterator[Finding]:
    told = {exchange.name for exchange in new.exchanges}
    for exchange in new.exchanges:
        old, name = before.get(exchange.name), _check_of(exchange.name)
        if old is None:
            sentence = f"{len(exchange.shape)} lines; there is nothing to compare with"
            yield Finding(GROUP, name, Status.NOT_JUDGED, sentence)
        elif exchange.name == TEMPLATE:
            yield _of_template(old, exchange.shape, other_template)
        else:
            yield _of_shape(name, old, exchange.shape)
    for missing in before.keys() - told:
        sentence = f"{missing} was answered before, and has no answer now"
        yield Finding(GROUP, _check_of(missing), Status.REGRESSED, sentence)


def _check_of(exchange: str) -> str:
    return exchange if exchange == TEMPLATE else f"shape.{exchange}"


def _of_template(old: list[str], new: list[str], other_template: bool) -> Finding:
    """Prompts are compared to the letter: a new line in one is another model's prompt."""
    if old == new:
        return Finding(GROUP, TEMPLATE, Status.PASSED, f"{len(new)} lines of prompts, as before")
    pairs = zip_longest(old, new, fillvalue="no more")
    was, now = next((was, now) for was, now in pairs if was != now)
    sentence = f"found the prompt line {now}; wanted {was}, as before"
    status = Status.NOT_JUDGED if other_template else Status.REGRESSED
    return Finding(GROUP, TEMPLATE, status, sentence)


def _of_shape(check: str, old: list[str], new: list[str]) -> Finding:
    changes = compare_shapes(old, new)
    sentences = [f"{path} is gone" for path in changes.gone]
    sentences += [f"{path} is {now}; was {was}" for path, was, now in changes.changed]
    status = Status.REGRESSED if sentences else Status.PASSED
    if changes.added:
        sentences.append(f"new: {', '.join(changes.added)}")
    figures: dict[str, Figure] = {
        "paths": changes.num_old,
        "gone": len(changes.gone),
        "changed": len(changes.changed),
    }
    said = "; ".join(sentences) or f"{changes.num_old} paths, as before"
    return Finding(GROUP, check, status, said, figures)

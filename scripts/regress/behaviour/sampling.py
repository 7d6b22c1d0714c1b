"""Cases: how a token is drawn. What must be equal is greedy or seeded; what must differ is drawn
often enough that chance does not make it equal.
"""

from __future__ import annotations

import statistics

from enginehouse.regress.behaviour.answers import Choice
from enginehouse.regress.behaviour.asker import (
    Asker,
    bias,
    messages,
    name_of,
    settled,
    want,
    want_equal,
)
from enginehouse.regress.subject.api import CHAT

_SUBJECTS = ("rivers", "bridges", "trains", "clocks")
_DRAWN = 16


def greedy(asker: Asker) -> None:
    """Temperature 0, and what leaves one token to draw from, choose the likeliest."""

    def check(attempt: int) -> None:
        question = f"Write a line about {_SUBJECTS[attempt]}."
        wanted = asker.chat(question, **asker.at_least(4)).said
        for name, value in (("top_k", 1), ("top_p", 1e-9), ("min_p", 1)):
            drawn = {"temperature": 1, name: value, **asker.at_least(4)}
            want_equal(asker.chat(question, **drawn).said, wanted, f"{name} {value}, beside greedy")

    settled(check)


def seed(asker: Asker) -> None:
    """A seed repeats its answer, and another seed gives another."""

    def check(attempt: int) -> None:
        def ask(number: int) -> list[str]:
            fields = {"temperature": 1, "max_tokens": _DRAWN, **asker.at_least(_DRAWN)}
            asked = [f"Write {attempt} random words about {subject}." for subject in _SUBJECTS[:3]]
            return [asker.chat(question, seed=number, **fields).said for question in asked]

        first, again, other = ask(7), ask(7), ask(8)
        same = sum(one == two for one, two in zip(first, again, strict=True))
        differ = sum(one != two for one, two in zip(first, other, strict=True))
        want(same >= 2, f"{same} of 3 answers came again with their seed; wanted two at least")
        want(differ >= 2, f"{differ} of 3 differ with another seed; wanted two at least")

    settled(check)


def several(asker: Asker) -> None:
    """n answers of one question, numbered, each drawn anew."""
    fields = {"temperature": 1, "max_tokens": _DRAWN, **asker.at_least(_DRAWN)}
    for found in (
        asker.chats("Write random words.", n=3, **fields),
        asker.texts("Random words:", n=3, seed=5, **fields),
    ):
        want_equal([choice.index for choice in found], [0, 1, 2], "indexes of n=3")
        texts = {choice.said for choice in found}
        want(len(texts) > 1, f"found three times {texts.pop()!r}; wanted answers that differ")


def best_of(asker: Asker) -> None:
    """The likeliest of those that were drawn, the best first."""
    fields = {"temperature": 1, "max_tokens": 6, **asker.at_least(6)}
    found = asker.texts("Random words:", best_of=4, n=2, logprobs=0, **fields)
    want_equal([choice.index for choice in found], [0, 1], "indexes of n=2 of best_of=4")
    first, second = (statistics.fmean(choice.logprobs) for choice in found)
    want(
        first >= second - 1e-6,
        f"found mean log probabilities {first:.4f} and {second:.4f}; wanted the best first",
    )
    one = asker.chats("Write random words.", best_of=3, **fields)
    want_equal(len(one), 1, "answers of best_of=3 without n")


def logit_bias(asker: Asker) -> None:
    """It forces a token, and forbids one."""
    forced, other = asker.words[:2]
    found = asker.chat(logprobs=True, **bias({forced.id: 100}))
    want_equal(_names(found), {forced.name}, f"tokens with a bias of 100 for {forced.name!r}")
    found = asker.chat(logprobs=True, **bias({forced.id: -100, other.id: 90}))
    want_equal(_names(found), {other.name}, f"tokens with a bias of 90 for {other.name!r}")


def penalties(asker: Asker) -> None:
    """Each changes what is chosen; one that grows with every use ends a repetition."""
    likely, second = asker.words[:2]
    fields = {"max_tokens": 24, "logprobs": True, **asker.at_least(24)}
    biased = bias({likely.id: 100, second.id: 85})
    found = _names(asker.chat(frequency_penalty=2, **fields, **biased))
    want(
        second.name in found,
        f"found {sorted(found)} in 24 tokens with frequency_penalty 2; wanted {second.name!r} too",
    )
    asked = {**fields, **asker.among_words()}
    for name, values in (("presence_penalty", (2, -2)), ("repetition_penalty", (5, 0.01))):
        changed = (
            asker.chat(subject, **{name: value}, **asked).said != plain
            for subject in _SUBJECTS
            for plain in [asker.chat(subject, **asked).said]
            for value in values
        )
        want(any(changed), f"{name} of {values} changes none of {len(_SUBJECTS)} greedy answers")


def advice(asker: Asker) -> None:
    """What has no effect is taken and told, and a field nobody knows is told or refused."""
    given = {
        "user": "somebody",
        "priority": 1,
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "safety_identifier": "a",
        "prompt_cache_key": "b",
        "response_format": {"type": "text"},
        "nobodys_field": 1,
    }
    of_chat = {
        "store": True,
        "verbosity": "low",
        "prediction": {"type": "content", "content": "a"},
    }
    reply = asker.granted(CHAT, messages=messages("Hello."), max_tokens=1, **given, **of_chat)
    told = set(reply.headers.get("x-ignored-fields", "").split(", "))
    silent = {"user", "priority", "response_format"}
    want_equal(told, given.keys() - silent | of_chat.keys(), "X-Ignored-Fields")
    asker.chat("Hello.", strict_fields=True, max_tokens=1)
    error = asker.refusal(CHAT, messages=messages("Hello."), strict_fields=True, nobodys_field=1)
    want_equal(error["param"], "nobodys_field", "param of an unknown field with strict_fields")


def _names(choice: Choice) -> set[str]:
    return {name_of(entry.token) for entry in choice.entries}


CASES = {
    "n": several,
    "best_of": best_of,
    "logit_bias": logit_bias,
    "penalties": penalties,
    "advice": advice,
}
ALONE = {"greedy": greedy, "seed": seed}

"""Cases: what ends an answer, exactly where, and what is said of it.

Tokens are counted by their logprobs: usage has a case of its own.
"""

from __future__ import annotations

from enginehouse.regress.behaviour.answers import Choice
from enginehouse.regress.behaviour.asker import (
    Asker,
    NotAsked,
    Unmet,
    bias,
    settled,
    want,
    want_equal,
)

_UNFOUND = "\u2603\u2603\u2603"
_BEGUN = 7


def stop(asker: Asker) -> None:
    """A stop string is found across tokens, cut exactly, and kept where that is asked for: of a
    completion, as a chat's words may be thoughts.
    """

    def check(attempt: int) -> None:
        question = f"Tell of {attempt} rivers."
        fields = {"max_tokens": 24, **asker.at_least(1), **asker.among_words()}
        whole = asker.text(question, **fields).text
        string = whole[_BEGUN : _BEGUN + 3]
        want(len(string) == 3, f"found an answer of {len(whole)} characters; wanted ten and more")
        cut = whole[: whole.index(string)]
        for stops in (string, [_UNFOUND, string]):
            _ended(asker.text(question, stop=stops, **fields), cut, string, asker)
        kept = asker.text(question, stop=string, include_stop_str_in_output=True, **fields)
        _ended(kept, cut + string, string, asker)
        unfound = asker.text(question, stop=[_UNFOUND], **fields)
        want_equal(unfound.text, whole, "an answer in which the stop string is not")

    settled(check)


def stop_token_ids(asker: Asker) -> None:
    """A token that the request names ends the answer, and is no text."""
    word = asker.words[0]
    found = asker.chat(stop_token_ids=[word.id], **bias({word.id: 100}))
    want_equal((found.text, found.finish_reason), ("", "stop"), "text and reason at a stop token")
    if asker.known.is_ours:
        want_equal(found.stop_reason, word.id, "stop_reason of a stop token")


def end_token(asker: Asker) -> None:
    """The model's own end token ends the answer, unless it is to be ignored."""
    for token_id in _ends(asker):
        forced = {**bias({token_id: 100}), "logprobs": True}
        found = asker.chat(**forced)
        want(
            found.finish_reason == "stop" and len(found.entries) <= 1,
            f"with nothing but the end token {token_id} likely: found {len(found.entries)} tokens "
            f"and finish_reason {found.finish_reason}; wanted none and stop",
        )
    onwards = asker.chat(ignore_eos=True, **forced)
    want_equal(onwards.finish_reason, "length", "finish_reason where the end token is ignored")


def length(asker: Asker) -> None:
    """A limit is reached and not passed, under both of its names."""
    for name in ("max_tokens", "max_completion_tokens"):
        limit = {"max_tokens": None, name: 5}
        found = asker.chat(logprobs=True, **asker.at_least(5), **limit)
        told = len(found.entries), found.finish_reason
        want_equal(told, (5, "length"), f"tokens and reason of an answer with {name} 5")
    if asker.known.is_ours:
        empty = asker.chat(max_tokens=0)
        want_equal((empty.text, empty.finish_reason), ("", "length"), "an answer of no tokens")


def min_tokens(asker: Asker) -> None:
    """No end token and no stop token comes before, however likely it is."""
    for token_id in _ends(asker):
        forced = {**bias({token_id: 100}), "logprobs": True}
        found = asker.chat(min_tokens=4, **forced)
        want(
            len(found.entries) >= 4,
            f"with nothing but the end token {token_id} likely: found {len(found.entries)} tokens; "
            "wanted min_tokens, 4",
        )
    word = asker.words[0]
    fields = {"stop_token_ids": [word.id], "logprobs": True, **bias({word.id: 100})}
    found = asker.chat(min_tokens=3, **fields)
    want(
        len(found.entries) >= 3, f"found {len(found.entries)} tokens; wanted 3 before a stop token"
    )


def _ended(found: Choice, text: str, string: str, asker: Asker) -> None:
    want_equal(found.text, text, f"an answer that ends at {string!r}")
    want_equal(found.finish_reason, "stop", f"finish_reason of an answer that ends at {string!r}")
    if asker.known.is_ours:
        want_equal(found.stop_reason, string, "stop_reason")


def _ends(asker: Asker) -> tuple[int, ...]:
    found = asker.known.eos_token_ids
    if found is None:
        raise NotAsked("the model's end tokens are not known from outside")
    if not found:
        raise Unmet("found no end token in the manifest; wanted one at least")
    return found


CASES = {
    "stop_token_ids": stop_token_ids,
    "end_token": end_token,
    "length": length,
    "min_tokens": min_tokens,
}
ALONE = {"stop": stop}

"""A server that is broken on purpose: the check that is named for it sees it, and no other does."""

from __future__ import annotations

import pytest

from doubles.broken_server import MUTATIONS, breaking
from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.behaviour.converse import ALONE, CASES, converse
from enginehouse.regress.behaviour.judging import Conversation, judge_behaviour
from enginehouse.regress.findings import Status
from makers.behaviour import api_at
from makers.gunicorn_server import Server

# What each must be seen by, and a word of the sentence.
SEEN: dict[str, tuple[set[str], str]] = {
    "none": (set(), ""),
    "seed_ignored": ({"seed"}, "with their seed"),
    "stop_strings_off": ({"stop"}, "an answer that ends at"),
    "json_mode_ignored": ({"json_object"}, "cut by length"),
    "eos_lost": ({"end_token"}, "end token"),
    "template_newline": ({"template"}, "prompt line"),
    "usage_off_by_one": ({"usage"}, "completion_tokens"),
    "field_vanished": (
        {"shape.chat", "shape.chat_logprobs", "shape.chat_tools", "shape.prompt_logprobs"},
        "system_fingerprint is gone",
    ),
    "logprob_off_by_one_position": ({"logprobs"}, "one position off"),
    "stream_misses_last_delta": ({"stream"}, "text of a stream"),
}
OF_SPEED = {"steps_10_percent_slower", "ttft_doubled"}  # which no answer shows


# Grammars, calls and penalties, which take long and no mutation touches, and a gauge that is told
# once a second: only the unbroken proxy is asked for them.
SLOW = {"structured_outputs", "guided_fields", "structural_tag", "penalties", "cancel"} | {
    *("tools_required", "tools_named", "tools_unforced", "stream_tools")
}


def test_every_mutation_has_a_check() -> None:
    assert SEEN.keys() | OF_SPEED == MUTATIONS.keys()


@pytest.mark.parametrize("name", SEEN)
def test_a_mutation_is_seen_by_its_check_alone(
    served: Server,
    known: Known,
    conversation: Conversation,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks, word = SEEN[name]
    for cases in (CASES, ALONE) if checks else ():
        for case in SLOW & cases.keys():
            monkeypatch.delitem(cases, case)
    with breaking(served.url, name) as url:
        found = judge_behaviour(conversation, converse(api_at(url), known), is_ours=True)
    seen = {each.check: each.sentence for each in found if each.status is Status.REGRESSED}
    assert seen.keys() == checks, seen
    assert all(word in sentence for sentence in seen.values()), seen


def test_an_unbroken_proxy_is_the_same_api(served: Server) -> None:
    with breaking(served.url, "none") as url:
        assert (
            api_at(url).send("GET", "/models").body
            == api_at(served.url).send("GET", "/models").body
        )

"""Cases: a stream says what the plain answer says, event by event in the form that it has to have.

What a stream lost on the way parts it from the plain answer every time; a model in doubt does so
once in a while, which is why each is tried more than once.
"""

from __future__ import annotations

from typing import Any

from enginehouse.regress.behaviour.answers import Choice, Streamed, choices_of
from enginehouse.regress.behaviour.asker import (
    Asker,
    messages,
    settled,
    skip_endless_thoughts,
    want,
    want_equal,
)
from enginehouse.regress.behaviour.grammars import CHARACTERS
from enginehouse.regress.behaviour.tools import TOOLS, skip_without_tools
from enginehouse.regress.subject.api import CHAT, COMPLETIONS

_BEGUN = 4  # characters before a stop string
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


def stream(asker: Asker) -> None:
    """Of a chat: text, tokens, reason, usage; cut at a stop string as the plain answer is."""

    def check(attempt: int) -> None:
        fields = {"max_tokens": 12, "logprobs": True, "top_logprobs": 1, **asker.at_least(6)}
        question = messages(f"Count from {attempt} upwards.")
        _, [plain] = _compare(asker, CHAT, messages=question, **fields)
        want(bool(plain.entries), "found no logprobs; wanted each token's")
        if string := plain.text[_BEGUN : _BEGUN + 2]:
            _compare(asker, CHAT, messages=question, stop=string, **fields)

    settled(check)


def stream_completions(asker: Asker) -> None:
    """Of two prompts at once, two choices each."""

    def check(attempt: int) -> None:
        prompts = [f"{attempt} rivers and", f"{attempt} bridges and"]
        fields = {"n": 2, "logprobs": 1, **asker.at_least(4)}
        _, plain = _compare(asker, COMPLETIONS, prompt=prompts, **fields)
        want_equal(len(plain), 4, "choices of two prompts with n=2")

    settled(check)


def stream_characters(asker: Asker) -> None:
    """A character that takes several tokens comes whole."""
    fields = {"structured_outputs": {"choice": [CHARACTERS]}, "max_tokens": 80}
    found = asker.stream(COMPLETIONS, prompt="Say it.", **fields)
    _check_form(found)
    want_equal(found.choices[0].text, CHARACTERS, "the stream of a text that is prescribed")
    pieces = [part["text"] for event in found.events for part in event["choices"]]
    want("\ufffd" not in "".join(pieces), "found U+FFFD in a piece; wanted whole characters")


def stream_tools(asker: Asker) -> None:
    """The pieces of a call make the call of the plain answer."""
    skip_without_tools(asker)

    def check(attempt: int) -> None:
        question = messages(f"How warm is it in {attempt} days?")
        fields: dict[str, Any] = {
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }
        fields |= {"max_tokens": 200, **asker.unthinking()}
        _, plain = _compare(asker, CHAT, messages=question, **fields)
        skip_endless_thoughts(plain[0])
        want(bool(plain[0].calls), "found no call; wanted the one that is required")

    settled(check)


def stream_usage(asker: Asker) -> None:
    """In no event, in one event, in every event, as it is asked; padding is no text."""
    question = messages("Count.")
    silent = asker.stream(CHAT, messages=question, stream_options={"include_usage": False})
    want_equal(silent.usages, 0, "events with usage where none is asked for")
    options = {
        "include_usage": True,
        "continuous_usage_stats": True,
        "include_obfuscation": False,
    }
    found = asker.stream(CHAT, messages=question, stream_options=options)
    _check_form(found)
    want_equal(found.usages, len(found.events), "events with usage of a stream where all tell it")


def _compare(asker: Asker, path: str, **fields: Any) -> tuple[Streamed, list[Choice]]:
    answer = asker.ask(path, **fields)
    plain = choices_of(answer)
    found = asker.stream(path, **fields)
    _check_form(found)
    for one, other in zip(found.in_order(), plain, strict=False):
        wanted = other.parts()
        for name, part in one.parts().items():
            want_equal(part, wanted[name], f"{name} of a stream, beside the plain answer")
    want_equal(len(found.choices), len(plain), "choices of a stream")
    want(found.usage is not None, "a stream told no usage; wanted it, as it is asked for")
    counts = {name: (found.usage or {}).get(name) for name in _COUNTS}
    want_equal(counts, {name: answer["usage"][name] for name in _COUNTS}, "usage of a stream")
    want_equal(found.events[-1]["choices"], [], "choices of the event that tells the usage")
    return found, plain


def _check_form(found: Streamed) -> None:
    want(not found.faults, f"a stream's form: {'; '.join(found.faults)}")


CASES = {"stream_characters": stream_characters, "stream_usage": stream_usage}
ALONE = {
    "stream": stream,
    "stream_completions": stream_completions,
    "stream_tools": stream_tools,
}

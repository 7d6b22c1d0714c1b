"""A prompt -> its greedy answer, token by token, from either shape in which servers tell log
probabilities. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from enginehouse.regress.subject.api import CHAT, COMPLETIONS, Api
from enginehouse.regress.subject.scores import NUM_TOP, tokenize
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerRefused

_DIGITS = 6


class Entry(NamedTuple):
    """A token of an answer as its logprobs tell it. top: the likeliest in its place, by name."""

    token: str
    logprob: float
    top: dict[str, float]


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """At temperature 0. prompt_ids: None where the server has no /tokenize. logprobs, top: nats, of
    each token by its text; [] where the server tells none.
    """

    name: str
    prompt_ids: list[int] | None
    text: str
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]
    top: list[dict[str, float]]


def answer_prompt(
    api: Api,
    name: str,
    *,
    prompt: str | list[int] | None = None,
    messages: list[dict[str, Any]] | None = None,
    tools: list[dict[str, Any]] | None = None,
    max_tokens: int,
) -> Answer:
    """Either a prompt is continued, or messages are answered. Raises ServerRefused, and
    EnginehouseError for what is no answer.
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    if messages is None:
        asked = prompt if isinstance(prompt, list) else None
        choice = _choice(api, COMPLETIONS, {"prompt": prompt, **fields}, {"logprobs": NUM_TOP})
        ids = tokenize(api, prompt=prompt) if asked is None else asked
    else:
        shown = {"messages": messages, **({"tools": tools} if tools else {})}
        wanted = {"logprobs": True, "top_logprobs": NUM_TOP}
        choice = _choice(api, CHAT, {**shown, **fields}, wanted)
        ids = tokenize(api, **shown)
    with answers_of(name):
        text = str(choice["text"]) if messages is None else _said(choice["message"])
        entries = entries_of(choice.get("logprobs"))
    return Answer(
        name,
        ids,
        text,
        str(choice.get("finish_reason")),
        [entry.token for entry in entries],
        [_rounded(entry.logprob) for entry in entries],
        [{token: _rounded(value) for token, value in entry.top.items()} for entry in entries],
    )


def _choice(
    api: Api, path: str, fields: dict[str, Any], logprobs: dict[str, Any]
) -> dict[str, Any]:
    """The first of an answer; without log probabilities where a server has none, or fewer."""
    try:
        body = api.ask(path, **fields, **logprobs)
    except ServerRefused as error:
        if error.status != 400:
            raise
        body = api.ask(path, **fields)
    with answers_of(path):
        choice: dict[str, Any] = body["choices"][0]
        return choice


@contextmanager
def answers_of(what: str) -> Iterator[None]:
    """What is not of the shape that it should have is one sentence."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EnginehouseError(
            f"the answer to {what} is of no shape known here ({reason})"
        ) from None


def _said(message: Mapping[str, Any]) -> str:
    """Content, and calls as their names and arguments."""
    calls = [
        f"{call['function']['name']}({call['function']['arguments']})"
        for call in message.get("tool_calls") or []
    ]
    return (
        "\n".join([message.get("content") or "", *calls]).strip("\n")
        if calls
        else str(message.get("content") or "")
    )


def entries_of(logprobs: dict[str, Any] | None) -> list[Entry]:
    """Of OpenAI's two shapes, that of completions and that of chats, which llama.cpp has for both;
    a token of which nothing is known has no number, and is left out.
    """
    if not logprobs:
        return []
    if "tokens" in logprobs:
        columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
        rows = zip(*columns, strict=True)
        return [Entry(token, own, top or {}) for token, own, top in rows if own is not None]
    return [
        # Parts of characters may have one name: the likeliest of them comes first, and is kept.
        Entry(item["token"], item["logprob"], {t["token"]: t["logprob"] for t in reversed(tops)})
        for item in logprobs["content"] or []
        for tops in [item.get("top_logprobs") or []]
        if item["logprob"] is not None
    ]


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)

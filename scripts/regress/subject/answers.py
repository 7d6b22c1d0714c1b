"""A prompt -> its greedy answer, token by token, from either shape in which servers tell log
probabilities. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from enginehouse.regress.subject.api import CHAT, COMPLETIONS, Api
from enginehouse.regress.subject.scores import NUM_TOP, tokenize

_DIGITS = 6
_Told = tuple[list[str], list[float], list[dict[str, float]]]


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
    """Either a prompt is continued, or messages are answered. Raises ServerRefused."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    if messages is None:
        body = api.ask(COMPLETIONS, prompt=prompt, logprobs=NUM_TOP, **fields)
        choice = body["choices"][0]
        text = str(choice["text"])
        ids = prompt if isinstance(prompt, list) else tokenize(api, prompt=prompt)
    else:
        fields |= {"tools": tools} if tools else {}
        body = api.ask(CHAT, messages=messages, logprobs=True, top_logprobs=NUM_TOP, **fields)
        choice = body["choices"][0]
        text = _said(choice["message"])
        ids = tokenize(api, messages=messages, **({"tools": tools} if tools else {}))
    tokens, logprobs, top = told_logprobs(choice.get("logprobs"))
    return Answer(name, ids, text, str(choice["finish_reason"]), tokens, logprobs, top)


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


def told_logprobs(told: Mapping[str, Any] | None) -> _Told:
    """Tokens, their log probabilities, and the likeliest's at each, of OpenAI's two shapes: that of
    completions and that of chats, which llama.cpp has for both.
    """
    if not told:
        return [], [], []
    if isinstance(told.get("content"), list):
        rows = told["content"]
        top = [{t["token"]: _rounded(t["logprob"]) for t in row["top_logprobs"]} for row in rows]
        return [row["token"] for row in rows], [_rounded(row["logprob"]) for row in rows], top
    tokens = list(told.get("tokens") or [])
    logprobs = [_rounded(value or 0.0) for value in told.get("token_logprobs") or []]
    tops = [
        {token: _rounded(value) for token, value in (row or {}).items()}
        for row in told.get("top_logprobs") or []
    ]
    return tokens, logprobs, tops


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)

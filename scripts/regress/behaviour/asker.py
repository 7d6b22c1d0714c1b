"""One server, as a case asks it; and how a case says that it did not find what it wanted.

Knows the API's forms, and no case. A question is answered greedily unless the case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import msgspec

from enginehouse.regress.behaviour.answers import Choice, Streamed, choices_of, read_stream
from enginehouse.regress.subject.api import CHAT, COMPLETIONS, TEMPLATE, TOKENIZE, Api, Reply
from enginehouse.runtime.errors import EnginehouseError

QUESTION = "Name a river and a bridge."
_WORDS = "one two three four five six seven eight nine ten"
_TRIES = 3


class Known(msgspec.Struct, frozen=True):
    """What is known of a server beside what it says itself. eos_token_ids: None where there is no
    manifest. prices: dollars per million tokens, of prompts and of answers.
    """

    eos_token_ids: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    is_ours: bool = False
    prices: tuple[float, float] | None = None


class Unmet(EnginehouseError):
    """A case found something else than it wanted; the message says both."""


class NotAsked(EnginehouseError):
    """The engine says that it cannot do what the case asks, as it may."""


class Token(NamedTuple):
    """name: its text without the white space around it, by which an answer's tokens are found."""

    id: int
    name: str


def want(met: bool, said: str) -> None:
    """Raise Unmet(said) unless it is met."""
    if not met:
        raise Unmet(said)


def want_equal(found: object, wanted: object, of: str) -> None:
    if found != wanted:
        raise Unmet(f"{of}: found {_brief(found)}; wanted {_brief(wanted)}")


def name_of(token: str) -> str:
    """A token's name, whether it is told as text or as a vocabulary spells it."""
    return token.replace("\u0120", " ").replace("\u2581", " ").strip()


def settled(check: Callable[[int], None]) -> None:
    """For greedy answers that must be equal: rounding may part two of them where the model is in
    doubt, a fault parts all. `check` is given the number of the try, from 0.
    """
    for attempt in range(_TRIES):
        try:
            return check(attempt)
        except Unmet:
            if attempt == _TRIES - 1:
                raise


def skip_endless_thoughts(found: Choice) -> None:
    """Nothing can be said of an answer that the limit cut before it began."""
    if found.thought and not found.text and not found.calls and found.finish_reason == "length":
        raise NotAsked("the model thinks for longer than it is given here")


class Asker:
    """The questions that cases are made of."""

    def __init__(self, api: Api, known: Known) -> None:
        self.api = api
        self.known = known

    def chat(self, said: str | list[dict[str, Any]] = QUESTION, /, **fields: Any) -> Choice:
        """The first choice of an answer."""
        return self.chats(said, **fields)[0]

    def chats(self, said: str | list[dict[str, Any]] = QUESTION, /, **fields: Any) -> list[Choice]:
        return choices_of(self.ask(CHAT, messages=messages(said), **fields))

    def ruled(self, said: str | list[dict[str, Any]], /, **fields: Any) -> Choice:
        """The same of an answer that a grammar rules, which it does once a model has thought."""
        found = self.chat(said, **self.unthinking(), **fields)
        skip_endless_thoughts(found)
        return found

    def unthinking(self) -> dict[str, Any]:
        """Fields that turn thinking off where the model's template can."""
        return {"reasoning_effort": "none"} if self.known.is_ours else {}

    def text(self, prompt: Any = QUESTION, /, **fields: Any) -> Choice:
        return self.texts(prompt, **fields)[0]

    def texts(self, prompt: Any = QUESTION, /, **fields: Any) -> list[Choice]:
        return choices_of(self.ask(COMPLETIONS, prompt=prompt, **fields))

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """What is answered to a question that is to be granted."""
        return self.granted(path, **fields).body  # type: ignore[no-any-return]

    def granted(self, path: str, **fields: Any) -> Reply:
        """The same with its headers. Raises Unmet for another status than 200."""
        reply = self.api.reply(path, **_defaults(path, fields))
        if reply.status != 200 or not isinstance(reply.body, dict):
            self._refused(reply, path)
        return reply

    def stream(self, path: str, **fields: Any) -> Streamed:
        """A whole stream; usage is told unless the case says otherwise."""
        options = {"stream_options": {"include_usage": True}}
        return read_stream(self.api.lines(path, **_defaults(path, {**options, **fields})))

    def refusal(self, path: str, **fields: Any) -> dict[str, Any]:
        """The error of a request that is to be refused with 400."""
        reply = self.api.reply(path, **_defaults(path, fields))
        asked = ", ".join(f"{name}={_brief(fields[name])}" for name in fields)
        want(reply.status == 400, f"{path} with {asked}: found HTTP {reply.status}; wanted 400")
        error: dict[str, Any] = reply.body["error"]
        return error

    def ids(self, text: str, **fields: Any) -> list[int]:
        found: list[int] = self.ask(TOKENIZE, prompt=text, **fields)["tokens"]
        return found

    def chat_ids(self, said: str | list[dict[str, Any]] = QUESTION) -> list[int]:
        """What a conversation becomes, the opened answer included."""
        found: list[int] = self.ask(TOKENIZE, messages=messages(said))["tokens"]
        return found

    def prompt(self, said: str | list[dict[str, Any]] = QUESTION, /, **fields: Any) -> str:
        """What the chat template makes of a conversation."""
        return str(self.ask(TEMPLATE, messages=messages(said), **fields)["prompt"])

    @cached_property
    def words(self) -> list[Token]:
        """Tokens of plain text, each of another name."""
        told = self.ask(TOKENIZE, prompt=_WORDS, add_special_tokens=False, return_token_strs=True)
        pairs = zip(told["tokens"], map(name_of, told["token_strs"]), strict=True)
        found = {name: token_id for token_id, name in pairs if name.isascii() and name.isalpha()}
        want(len(found) > 3, f"/tokenize of {_WORDS!r} names {len(found)} words; wanted four")
        return [Token(token_id, name) for name, token_id in found.items()]

    def among_words(self) -> dict[str, Any]:
        """Fields that leave the model its choice among `words`, whatever it is."""
        return bias({token.id: 100 for token in self.words})

    def at_least(self, num_tokens: int) -> dict[str, Any]:
        """Fields that keep a model from ending its answer at once."""
        if self.known.is_ours:
            return {"min_tokens": num_tokens}
        return bias(dict.fromkeys(self.known.eos_token_ids or (), -100))

    def endless(self) -> dict[str, Any]:
        """The same for an answer whose tokens must all be the model's own choice."""
        return {"ignore_eos": True} if self.known.is_ours else {}

    @cached_property
    def scores_prompts(self) -> bool:
        """Whether the engine tells log probabilities of a prompt's tokens, as not all can."""
        fields = {"prompt": QUESTION, "max_tokens": 1, "prompt_logprobs": 0}
        reply = self.api.reply(COMPLETIONS, **fields)
        error = reply.body.get("error", {}) if isinstance(reply.body, dict) else {}
        refused = reply.status == 400 and error.get("param") in ("prompt_logprobs", "logprobs")
        return not refused

    def _refused(self, reply: Reply, path: str) -> NoReturn:
        error = reply.body.get("error") if isinstance(reply.body, dict) else None
        told = error if isinstance(error, dict) else {"message": reply.body}
        said = f"{path} answers HTTP {reply.status}: {_brief(told.get('message'))}"
        if told.get("code") == "context_length_exceeded":
            raise NotAsked(said)
        raise Unmet(f"{said}; wanted HTTP 200")


def messages(said: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A question as a conversation; a conversation as it is."""
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


def bias(biases: dict[int, float]) -> dict[str, Any]:
    """The field of it; none for no tokens."""
    named = {str(token_id): value for token_id, value in biases.items()}
    return {"logit_bias": named} if named else {}


def _defaults(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    generates = path in (CHAT, COMPLETIONS)
    return {**({"temperature": 0, "max_tokens": 8} if generates else {}), **fields}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-57:]}"

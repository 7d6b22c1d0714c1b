"""Completions without a server: their terms, and a scripted generation played through them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from doubles.scripted_client import Script, ScriptedGeneration
from enginehouse.server.answer.choice import Endings
from enginehouse.server.answer.completion import Completion, Delta, Prices, Terms
from enginehouse.server.api.chat.answer import ChatCompletion
from enginehouse.server.text.answer import AnswerParser, PlainParser
from makers.token_outputs import PIECES

PRICES = Prices(Decimal("0.35"), Decimal("0.40"))
MOMENTS = ("clock", "started_s")


def terms(num_choices: int = 1, stops: tuple[str, ...] = (), **more: Any) -> Terms:
    given: dict[str, Any] = {
        "model": "tiny",
        "pieces": PIECES,
        "prices": PRICES,
        "num_prompt_tokens": 15,
        "num_sequences": num_choices,
        "num_returned": num_choices,
        "endings": Endings(stops),
    }
    return Terms(**{**given, **more})


def completion(
    num_choices: int = 1,
    stops: tuple[str, ...] = (),
    make_parser: Callable[[], AnswerParser] = PlainParser,
    **more: Any,
) -> ChatCompletion:
    moments = {name: more.pop(name) for name in MOMENTS if name in more}
    return ChatCompletion(
        terms(num_choices, stops, **more),
        make_parser,
        completion_id="chatcmpl-1",
        created=7,
        **moments,
    )


def play(answer: Completion, script: Script) -> tuple[list[Delta | None], ScriptedGeneration]:
    generation = ScriptedGeneration(script, len(answer.choices))
    return list(answer.run(generation)), generation

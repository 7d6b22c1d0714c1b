"""What the scripted engine says: to each prompt texts, of which it says the first that it may.

A free answer is what a model would say that is good. Where a request asks for a grammar, the free
one breaks it, and the first of ENFORCED that follows it is said: a grammar that came to the engine
too wide or too narrow is seen by whoever asked. Knows no client by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any

Script = Callable[[str], Iterator[str]]

# How functions and results stand in a prompt whose template knows neither: see tool_messages.py.
_SHOWN = "You can call these functions"
_RESULT = "Result of "
_USER = "<|im_start|>user\n"


def call(name: str, /, **arguments: Any) -> str:
    """In the generic format of calls."""
    return json.dumps({"name": name, "arguments": arguments})


PLAIN = "The capital of France is Paris."
TOLD = "It is 18 degrees and clear in Paris."
WEATHER = call("get_weather", city="Paris", unit="C")
_PARIS = {"name": "Paris", "country": "France"}
_OBJECTS: tuple[dict[str, Any], ...] = (
    _PARIS,
    {**_PARIS, "capital": True},
    {"in_europe": True, "continent": "Europe"},
    {"status": "ok"},  # compatcanary's
)
# A structured answer by a tool: the clients name it after the object, or as they please.
_AS_CALLS = product(("City", "PartialCity", "final_result", "json"), _OBJECTS[:2])
ENFORCED = (
    WEATHER,
    call("get_weather", city="Paris"),
    call("get_weather", location="Paris"),  # llm-comply's
    call("compatcanary_echo", value="CANARY_OK"),
    *(call(name, **arguments) for name, arguments in _AS_CALLS),
    *map(json.dumps, _OBJECTS),
    "1889-03-31",
    "yes",
)


def to_clients(prompt: str) -> Iterator[str]:
    """A call where the weather is asked for and functions are shown; its result in words."""
    last = prompt.rpartition(_USER)[2]
    if _RESULT in last:
        free = TOLD
    else:
        free = WEATHER if "weather" in last and _SHOWN in prompt else PLAIN
    return chain((free,), ENFORCED)


def in_turns(turns: Sequence[str]) -> Script:
    """One after the other, by the number of results in the prompt; the last from then on."""

    def answers(prompt: str) -> Iterator[str]:
        yield turns[min(prompt.count(_RESULT), len(turns) - 1)]

    return answers

"""What every client asks, how its answer is printed, and what must be true of it.

A client finds its server in OPENAI_BASE_URL, OPENAI_API_KEY and MODEL, as the client library itself
does where it reads them. Answers are short, each request has a time limit, none is sent twice.
"""

from __future__ import annotations

import json
import os
from typing import Any

BASE_URL = os.environ["OPENAI_BASE_URL"]
API_KEY = os.environ["OPENAI_API_KEY"]
MODEL = os.environ["MODEL"]

MAX_TOKENS = 64
TIMEOUT_S = 60
QUESTION = "What is the capital of France?"
WEATHER_QUESTION = "What is the weather in Paris?"
RESULT = json.dumps({"celsius": 18, "sky": "clear"})
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CITY: dict[str, Any] = {
    "title": "City",
    "description": "A city and its country.",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "country": {"type": "string", "maxLength": 16},
        "capital": {"type": "boolean"},
    },
    "required": ["name", "country", "capital"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": CITY, "strict": True},
}


def say(title: str, told: Any) -> None:
    text = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)
    print(f"  {title:<24} {text}", flush=True)


def say_stream(pieces: list[str], plain: str) -> None:
    """The parts of a streamed answer; together they are what the plain answer said."""
    say("stream", "|".join(piece for piece in pieces if piece))
    assert "".join(pieces) == plain, "the stream says something else"


def check_arguments(name: str, arguments: Any) -> None:
    data = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather", name
    assert set(data) == {"city", "unit"} and data["unit"] in ("C", "F"), data


def check_city(data: Any) -> None:
    assert set(data) == {"name", "country", "capital"} and type(data["capital"]) is bool, data

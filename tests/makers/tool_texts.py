"""Answers with calls in them, in every format, and what they are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from enginehouse.server.formats.command import Command
from enginehouse.server.formats.glm4 import Glm4
from enginehouse.server.formats.hermes import Granite, Hermes, Nemotron, Phi4Mini
from enginehouse.server.formats.hunyuan import Hunyuan, HunyuanList
from enginehouse.server.formats.lfm2 import Lfm2
from enginehouse.server.formats.llama import GenericJson, LlamaJson
from enginehouse.server.formats.mistral import Mistral, MistralNamed, MistralSpaced
from enginehouse.server.formats.pythonic import Pythonic
from enginehouse.server.formats.token_marked import DeepSeekV3, DeepSeekV31, KimiK2
from enginehouse.server.formats.xml import Glm45, MiniMaxM2, Qwen3Coder, SeedOss
from enginehouse.server.text.answer import (
    AnswerParser,
    Content,
    Part,
    Reasoning,
    ToolArguments,
    ToolCallStart,
)
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction

FORMATS: dict[str, Format] = {
    "llama3_json": LlamaJson(),
    "llama_pythonic": Pythonic(),
    "hermes": Hermes(),
    "nemotron": Nemotron(),
    "mistral": Mistral(),
    "mistral_spaced": MistralSpaced(),
    "mistral_named": MistralNamed(),
    "json": GenericJson(),
    "deepseek_v3": DeepSeekV3(),
    "deepseek_v31": DeepSeekV31(),
    "kimi_k2": KimiK2(),
    "granite": Granite(),
    "phi4_mini": Phi4Mini(),
    "command": Command(),
    "glm4": Glm4(),
    "lfm2": Lfm2(),
    "hunyuan": Hunyuan(),
    "hunyuan_list": HunyuanList(),
}
XML_FORMATS: dict[str, Format] = {
    "qwen3_coder": Qwen3Coder(),
    "seed_oss": SeedOss(),
    "minimax_m2": MiniMaxM2(),
    "glm45": Glm45(),
}
NAMES = ("f", "g", "get_weather", "a.b-c")
CLOCK = ToolFunction("get_time")
TIME = ToolCall("", "get_time", {})


def feed(parser: AnswerParser, pieces: Iterable[str]) -> list[Part]:
    """All parts, neighbours of one kind joined, ids checked and left out."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        match part, last:
            case Content(text), Content(before):
                joined[-1] = Content(before + text)
            case Reasoning(text), Reasoning(before):
                joined[-1] = Reasoning(before + text)
            case ToolArguments(number, text), ToolArguments(same, before) if number == same:
                joined[-1] = ToolArguments(number, before + text)
            case ToolCallStart(number, call_id, name), _:
                assert len(call_id) == 29 and call_id.startswith("call_"), call_id
                int(call_id[5:], 16)
                joined.append(ToolCallStart(number, "", name))
            case _:
                joined.append(part)
    return joined


def content_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls_of(parts: list[Part]) -> list[tuple[str, Any]]:
    """Name and arguments of each call; its number, place and JSON are checked."""
    calls: list[tuple[str, Any]] = []
    for before, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, ToolCallStart):
            assert part.number == len(calls)
            calls.append((part.name, None))
        elif isinstance(part, ToolArguments):
            assert isinstance(before, ToolCallStart) and before.number == part.number
            calls[-1] = (calls[-1][0], json.loads(part.text))
    return calls


# Where a text is cut into pieces: more than it has counts from its beginning again.
CUTS = st.lists(st.integers(0, 2000), max_size=12)


def split(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True

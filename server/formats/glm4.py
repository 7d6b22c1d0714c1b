"""GLM-4-0414 and GLM-Z1: a function's name on a line of its own, and behind it an object.

    get_weather
    {"city": "Paris"}<|assistant|>get_time
    {}

The first stands right behind the prompt. No mark begins a call: it is known by the name.
Source: the chat template of GLM-4-9B-0414, where the name is an assistant message's `metadata`;
ms-swift's agent template of it.
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, skip_space

_ASSISTANT = "<|assistant|>"


class Glm4Parser(CallParser):
    """Names at the start of a line."""

    openings = (_ASSISTANT,)

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self.bare_openings = "".join({name[0] for name in names})
        super().__init__(names, max_calls)

    def _read(self, opening: str) -> Reader:
        name = (yield from skip_space()) if opening in self.openings else opening
        while name[-1] != "\n":
            if not any(known.startswith(name.rstrip()) for known in self._names):
                raise NotACall(counted=False)
            name += yield
        if (yield from skip_space()) != "{":
            raise NotACall(counted=False)
        yield from self._stream_object(name.rstrip())
        return ""


class Glm4(Format):
    name = "glm4"
    kept = (_ASSISTANT,)
    before = ""
    middle = "\n"
    after = ""
    between = _ASSISTANT

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return Glm4Parser(names, max_calls)

"""Mistral: a list of calls after `[TOOL_CALLS]`; since tokenizer v11, each call by its own tokens.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, ...]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]...

Both are read; which one a model is held to follows from its template.
Source: mistral-common, instruct tokenizers v3 to v13.
"""

from __future__ import annotations

from collections.abc import Collection

from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.parser import CallParser, NotACall, Reader, skip_space

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralParser(CallParser):
    openings = (OPEN,)

    def _read(self, opening: str) -> Reader:
        char = yield from skip_space()
        if char == "[":
            yield from self._read_list()
        elif char == "{":
            yield from self._read_object()
        else:
            yield from self._read_named(char)
        return ""

    def _read_list(self) -> Reader:
        while True:
            if (yield from skip_space()) != "{":
                raise NotACall
            yield from self._read_object()
            char = yield from skip_space()
            if char == "]":
                return ""
            if char != ",":
                raise NotACall

    def _read_named(self, char: str) -> Reader:
        """name[ARGS]{...}; a [CALL_ID] between, as v11 has it, is the model's own and dropped."""
        name = char
        while not name.endswith("["):
            if len(name) > 64:
                raise NotACall
            name += yield
        taken = "["
        while not taken.endswith(ARGS):
            taken += yield
            if not ARGS.startswith(taken) and not _is_call_id(taken):
                raise NotACall
        name = name[:-1].strip()
        if (yield from skip_space()) != "{":
            raise NotACall
        yield from self._stream_object(name)
        return ""


def _is_call_id(text: str) -> bool:
    """The beginning of `[CALL_ID]x[ARGS]`."""
    if len(text) <= len(CALL_ID):
        return CALL_ID.startswith(text)
    call_id, bracket, rest = text.removeprefix(CALL_ID).partition("[")
    return text.startswith(CALL_ID) and len(call_id) <= 64 and ARGS.startswith(bracket + rest)


class Mistral(Format):
    name = "mistral"
    kept = (OPEN, CALL_ID, ARGS)
    trigger = OPEN
    opening = OPEN + "["
    between = ", "
    closing = "]"

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return MistralParser(names, max_calls)


class MistralSpaced(Mistral):
    """As sentencepiece templates write it."""

    opening = OPEN + " ["


class MistralNamed(Mistral):
    """Since tokenizer v11."""

    opening = ""
    before = OPEN
    middle = ARGS
    after = ""
    between = ""
    closing = ""


def mistral_of(template: str) -> Mistral:
    """The form that a chat template writes past calls in."""
    if ARGS in template:
        return MistralNamed()
    return MistralSpaced() if OPEN + " [" in template else Mistral()

"""The part of a call parser that all formats share: text around calls, and a call's JSON object.

A format's file says which texts open a call and reads what follows, a character at a time. What
turns out to be no call is content again, to the letter. White space around calls is dropped.
This file does not know any model's format, the request or the template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Generator
from itertools import groupby

from enginehouse.server.text.answer import Content, Part, ToolArguments, ToolCallStart
from enginehouse.server.tools.json_reader import JsonValue, NotJson, object_text

Reader = Generator[None, str, str]  # sent a character at a time
_ARGUMENTS = ("arguments", "parameters")
_OTHER_KEYS = frozenset({"type", "id"})


class NotACall(Exception):
    """What was read is content. counted: it had gone far enough to look like a call."""

    def __init__(self, counted: bool = True) -> None:
        self.counted = counted


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class CallParser:
    """An AnswerParser; a subclass sets the openings and has _read.

    openings: texts that open a call wherever they stand. bare_openings: characters that may do so
    as the first of a line or after a call. name_key, other_keys: of a call's object, beside its
    arguments; what the others say is passed over. names: the functions there are; a call of any
    other is content. max_calls: a call beyond these is read and not given.
    """

    openings: tuple[str, ...] = ()
    bare_openings: str = ""
    name_key = "name"
    other_keys = _OTHER_KEYS

    thinks = False

    def __init__(
        self,
        names: Collection[str],
        max_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.num_failed = 0
        marks = "".join({text[0] for text in (*self.openings, *self.bare_openings)})
        self._plain = re.compile(f"[^{re.escape(marks)}\\s]+")  # may begin nothing
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._new_id = new_id
        self._num_calls = 0
        self._is_surplus = False
        self._parts: list[Part] = []
        self._reader: Reader | None = None
        self._is_bare = False  # the reader was opened by one of bare_openings
        self._call_is_whole = False  # and what the reader took since only ends or parts calls
        self._raw = ""  # what the reader took since it last gave a part
        self._space = ""  # white space that is dropped if a call follows
        self._opening = ""  # the beginning of one of the openings
        self._line_is_blank = True
        self._after_call = False

    def _read(self, opening: str) -> Reader:
        """Read the calls that follow an opening."""
        raise NotImplementedError

    def push(self, text: str) -> list[Part]:
        place = 0
        while place < len(text):
            plain = None
            if self._reader is None and not self._opening:
                plain = self._plain.match(text, place)
            if plain is None:
                self._take(text[place])
                place += 1
            else:
                self._write(self._space + plain[0])
                self._space = ""
                place = plain.end()
        return self._drain()

    def flush(self) -> list[Part]:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            if not self._call_is_whole:
                self.num_failed += 1
                self._write(self._raw)
        elif self._opening or not self._after_call:
            self._write(self._space + self._opening)
        self._raw = self._space = self._opening = ""
        return self._drain()

    def _drain(self) -> list[Part]:
        """The parts so far, neighbours of one kind joined."""
        joined: list[Part] = []
        for _, group in groupby(self._parts, _kind):
            part = next(group)
            if isinstance(part, (Content, ToolArguments)):
                rest = (item.text for item in group if not isinstance(item, ToolCallStart))
                part = part._replace(text="".join([part.text, *rest]))
            joined.append(part)
        self._parts = []
        return joined

    def _take(self, char: str) -> None:
        if self._reader is None:
            self._take_text(char)
            return
        self._raw += char
        try:
            self._reader.send(char)
        except StopIteration as end:
            self._reader, self._raw = None, ""
            for rest in end.value:
                self._take(rest)
        except (NotACall, NotJson) as error:
            counted = not isinstance(error, NotACall) or error.counted or not self._is_bare
            self.num_failed += counted
            raw, self._raw, self._reader = self._raw[:-1], "", None
            self._after_call = self._line_is_blank = False
            self._write(raw)
            self._take(char)

    def _take_text(self, char: str) -> None:
        begun = self._opening + char
        if begun in self.openings:
            self._opening = ""
            self._begin(begun)
        elif any(opening.startswith(begun) for opening in self.openings):
            self._opening = begun
        elif self._opening:
            first, rest = self._opening[0], self._opening[1:] + char
            self._opening = ""
            self._write(self._space + first)
            self._space = ""
            for char in rest:
                self._take(char)
        elif char.isspace():
            self._space += char
            self._line_is_blank |= char == "\n"
        elif char in self.bare_openings and (self._line_is_blank or self._after_call):
            self._begin(char)
        else:
            self._write(self._space + char)
            self._space = ""

    def _begin(self, opening: str) -> None:
        self._reader = self._read(opening)
        next(self._reader)
        self._raw, self._space = self._space + opening, ""
        self._is_bare = opening not in self.openings
        self._call_is_whole = False

    def _write(self, text: str) -> None:
        if text:
            self._parts.append(Content(text))
            self._line_is_blank = not text[text.rfind("\n") + 1 :].strip()
            self._after_call = False

    def _start_call(self, name: str) -> None:
        if name not in self._names:
            raise NotACall
        self._line_is_blank = self._after_call = True
        self._call_is_whole = False
        self._is_surplus = self._num_calls == self._max_calls
        if not self._is_surplus:
            self._parts.append(ToolCallStart(self._num_calls, self._new_id(), name))
            self._num_calls += 1

    def _add_arguments(self, text: str) -> None:
        self._raw = ""  # all that led here is part of the call
        if not self._is_surplus:
            self._parts.append(ToolArguments(self._num_calls - 1, text))

    def _end_call(self) -> None:
        self._call_is_whole = True

    def _read_object(self) -> Generator[None, str, None]:
        """A call's object after its brace: name and arguments, whichever comes first."""
        self._call_is_whole = False
        name: str | None = None
        held: str | None = None  # arguments that came before the name
        keys: set[str] = set()
        char = yield from skip_space()
        while char != "}" or keys:
            key = yield from read_string(char)
            known = (self.name_key, *_ARGUMENTS, *self.other_keys)
            if key not in known or key in keys:
                raise NotACall(counted=name is not None)
            keys |= set(_ARGUMENTS) if key in _ARGUMENTS else {key}
            if (yield from skip_space()) != ":":
                raise NotACall(counted=name is not None)
            char = yield from skip_space()
            if key == self.name_key:
                name = yield from read_string(char)
                if name not in self._names:
                    raise NotACall
            elif key in _ARGUMENTS:
                held = yield from self._read_arguments(char, name)
            else:
                yield from read_value(char)
            if name is not None and held is not None:
                self._give_call(name, held)
                held = None
            char = yield from skip_space()
            if char == "}":
                break
            if char != ",":
                raise NotACall
            char = yield from skip_space()
        if name is None:
            raise NotACall(counted=False)
        if "arguments" not in keys:
            self._give_call(name, "{}")

    def _give_call(self, name: str, arguments: str) -> None:
        self._start_call(name)
        self._add_arguments(arguments)
        self._end_call()

    def _read_arguments(self, char: str, name: str | None) -> Generator[None, str, str | None]:
        """Give an object's text as it comes, once the name is known; else the text, to be held.

        null is an empty object; a string is taken when it is the JSON text of an object.
        """
        if char == "{":
            if name is None:
                return (yield from read_value(char))
            yield from self._stream_object(name)
            return None
        text = yield from read_value(char)
        if text == "null":
            return "{}"
        inner = object_text(json.loads(text)) if char == '"' else None
        if inner is None:
            raise NotACall
        return inner

    def _stream_object(self, name: str) -> Generator[None, str, None]:
        """The arguments of a call, whose brace was read, piece by piece."""
        self._start_call(name)
        value = JsonValue()
        self._add_arguments(value.take("{"))
        while not value.done:
            char = yield
            self._add_arguments(value.take(char))
        self._end_call()


def _kind(part: Part) -> tuple[type, int]:
    number = part.number if isinstance(part, (ToolCallStart, ToolArguments)) else 0
    return type(part), number


def skip_space() -> Reader:
    """The next character that is no white space."""
    while True:
        char = yield
        if char not in " \t\n\r":
            return char


def read_mark(mark: str, taken: str) -> Reader:
    """A text that begins with taken: the mark, or as much as tells that it is another."""
    while mark.startswith(taken) and taken != mark:
        taken += yield
    return taken


def read_value(char: str) -> Reader:
    """The JSON text of a value that begins with char."""
    value = JsonValue()
    pieces = [value.take(char)]
    while not value.done:
        char = yield
        pieces.append(value.take(char))
    return "".join(pieces)


def read_string(char: str) -> Reader:
    """The text of a JSON string that begins with char."""
    if char != '"':
        raise NotACall(counted=False)
    text = yield from read_value(char)
    return str(json.loads(text))


def read_literal(literal: str) -> Reader:
    """Take a text that is optional, with the white space before it; what was read in its stead."""
    taken = ""
    while True:
        char = yield
        taken += char
        body = taken.lstrip()
        if body == literal:
            return ""
        if not literal.startswith(body):
            return taken

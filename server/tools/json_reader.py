"""JSON read a character at a time: what may still become a value, and where the value ends.

This file does not know tools, models or what the value is for.
Source: RFC 8259. One thing is mended on the way: a raw control character within a string, which
models write and JSON forbids, comes out as its escape.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100  # deeper than any client's parser may be asked to go
_MAX_NUMBER_CHARS = 400
_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_BEGUN = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?((?<=[0-9])[eE][+-]?[0-9]*)?)?")
_LITERALS = {literal[0]: literal for literal in ("true", "false", "null")}
_CLOSER = {"{": "}", "[": "]"}


class NotJson(ValueError):
    """No value goes on like this."""


class JsonValue:
    """One object, list, string or literal. done: its last character was taken.

    A number on its own is refused: nothing but the character after it would tell its end.
    """

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []
        self._expects = "value"  # value, item, key, member, colon, next, string, escape, hex, ...
        self._is_key = False
        self._token = ""  # of a number, a literal or the digits of an escape

    def take(self, char: str) -> str:
        """The JSON text that stands for the character; NotJson when it cannot follow."""
        match self._expects:
            case "string":
                return self._take_in_string(char)
            case "escape":
                if char not in '"\\/bfnrtu':
                    raise NotJson
                self._expects, self._token = ("hex", "") if char == "u" else ("string", "")
            case "hex":
                if char not in "0123456789abcdefABCDEF":
                    raise NotJson
                self._token += char
                if len(self._token) == 4:
                    self._expects = "string"
            case "literal":
                literal = _LITERALS[self._token[0]]
                self._token += char
                if not literal.startswith(self._token):
                    raise NotJson
                if literal == self._token:
                    self._end_value()
            case "number":
                self._take_in_number(char)
            case _:
                if char not in _SPACE:
                    self._take_structure(char)
        return char

    def _take_structure(self, char: str) -> None:
        expects = self._expects
        if expects in ("value", "item"):
            if char == "]" and expects == "item":
                self._close(char)
            else:
                self._begin_value(char)
        elif expects in ("key", "member"):
            if char == "}" and expects == "member":
                self._close(char)
            elif char == '"':
                self._expects, self._is_key = "string", True
            else:
                raise NotJson
        elif expects == "colon":
            if char != ":":
                raise NotJson
            self._expects = "value"
        elif char == ",":
            self._expects = "key" if self._open[-1] == "{" else "value"
        else:
            self._close(char)

    def _begin_value(self, char: str) -> None:
        if char in _CLOSER:
            if len(self._open) == MAX_DEPTH:
                raise NotJson
            self._open.append(char)
            self._expects = "member" if char == "{" else "item"
        elif char == '"':
            self._expects, self._is_key = "string", False
        elif char in _LITERALS:
            self._expects, self._token = "literal", char
        elif self._open and char in "-0123456789":
            self._expects, self._token = "number", char
        else:
            raise NotJson

    def _take_in_string(self, char: str) -> str:
        if char == '"':
            if self._is_key:
                self._expects, self._is_key = "colon", False
            else:
                self._end_value()
        elif char == "\\":
            self._expects = "escape"
        elif char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _take_in_number(self, char: str) -> None:
        if char in "0123456789+-.eE":
            self._token += char
            if len(self._token) > _MAX_NUMBER_CHARS or not _NUMBER_BEGUN.fullmatch(self._token):
                raise NotJson
            return
        if not _NUMBER.fullmatch(self._token):
            raise NotJson
        self._end_value()
        if char not in _SPACE:
            self._take_structure(char)

    def _close(self, char: str) -> None:
        if _CLOSER[self._open[-1]] != char:
            raise NotJson
        self._open.pop()
        self._end_value()

    def _end_value(self) -> None:
        self._expects = "next"
        self.done = not self._open


def to_json(value: Any) -> str:
    """JSON text that is valid UTF-8: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def object_text(text: str) -> str | None:
    """The JSON text of the object that a text holds, by the same rules; None when it holds none."""
    found = value_text(text)
    return found if found is not None and found[0] == "{" else None


def value_text(text: str) -> str | None:
    """The same of any value."""
    stripped = text.strip(_SPACE)
    value = JsonValue()
    pieces = []
    try:
        if stripped[:1] in tuple("-0123456789"):  # nothing else tells a number's end
            return (
                stripped
                if _NUMBER.fullmatch(stripped) and len(stripped) <= _MAX_NUMBER_CHARS
                else None
            )
        for char in stripped:
            if value.done:
                return None
            pieces.append(value.take(char))
        text.encode()  # half a surrogate pair
    except ValueError:
        return None
    return "".join(pieces) if value.done else None

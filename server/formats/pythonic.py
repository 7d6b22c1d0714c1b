"""Llama 3.2 and 4, pythonic: one list of Python calls with literal keyword arguments.

    [get_weather(city="Paris"), get_time(zone="Europe/Paris")]

A call is given when its closing parenthesis is read, with its arguments as JSON. No grammar of
JSON schemas holds for Python text: a call that is required is asked for as a JSON object instead,
which the same parser reads.
Source: Meta's prompt format for Llama 3.2, "zero-shot function calling".
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from enginehouse.server.formats.llama import PYTHON_TAG, BareJsonParser, LlamaJson
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import MAX_DEPTH, to_json
from enginehouse.server.tools.parser import NotACall, Reader, read_literal, skip_space

_START, _END = "<|python_start|>", "<|python_end|>"  # Llama 4
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser(BareJsonParser):
    openings: tuple[str, ...] = (PYTHON_TAG, _START)
    bare_openings = "[{"

    def _read(self, opening: str) -> Reader:
        char = opening if opening in self.bare_openings else (yield from skip_space())
        if char == "{":
            return (yield from super()._read(char))
        if char != "[":
            raise NotACall
        while char != "]":
            char = yield from self._read_call((yield from skip_space()))
        return (yield from read_literal(_END))

    def _read_call(self, char: str) -> Reader:
        """A call that begins with char, and the `,` or `]` after it, which is returned."""
        self._call_is_whole = False
        name = ""
        while char != "(":
            if len(name) == 64 or not (char.isalnum() or char in "_.-"):
                raise NotACall(counted=bool(self._num_calls))
            name += char
            char = yield
        if name not in self._names:
            raise NotACall
        arguments = parse_arguments((yield from _read_to_parenthesis()))
        if arguments is None:
            raise NotACall
        self._give_call(name, arguments)
        char = yield from skip_space()
        if char not in ",]":
            raise NotACall
        return char


def _read_to_parenthesis() -> Reader:
    """The text up to the parenthesis that closes one already read."""
    text, quote, depth = [""], "", 1
    while True:
        char = yield
        if quote:
            if text[-1] == "\\":  # and this is what it escapes, whatever that is
                char = text.pop() + char
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return "".join(text)
        if depth > MAX_DEPTH:
            raise NotACall
        text.append(char)


def parse_arguments(text: str) -> str | None:
    """`a=1, b="x"` -> `{"a": 1, "b": "x"}`; None when that is not literal keyword arguments.

    JSON's true, false and null are taken for Python's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d", which models write
            call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        arguments = {item.arg: _literal(item.value) for item in call.keywords}
        if None in arguments or len(arguments) != len(call.keywords):
            return None
        return to_json(arguments)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def python_text(calls: Sequence[ToolCall]) -> str:
    """A list of Python calls."""
    written = []
    for call in calls:
        arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
        written.append(f"{call.name}({arguments})")
    return f"[{', '.join(written)}]"


def _literal(node: ast.expr) -> Any:
    """The value of a literal; ValueError for all else."""
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, (str, int, float)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (
            int,
            float,
        ):
            return -value  # type: ignore[operator]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            texts = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError
            return dict(zip(texts, map(_literal, values), strict=True))
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
    raise ValueError


class Pythonic(Format):
    name = "llama_pythonic"
    kept = (PYTHON_TAG, _START, _END)

    def parser(self, names: Collection[str], max_calls: int | None = None) -> AnswerParser:
        return PythonicParser(names, max_calls)

    def call_text(self, calls: Sequence[ToolCall]) -> str:
        return python_text(calls)

    def forced(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any]:
        return LlamaJson().forced(functions, parallel)

    def free(self, functions: Sequence[ToolFunction], parallel: bool) -> dict[str, Any] | None:
        return None

"""Three hundred bodies that no chat completion may be made of, each with its right answer.

Made by rules from short lists: what is wrong, where it stands, and which field the refusal names.
A body is bytes, or a function that makes them: the largest are not held beside each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MODEL = "tiny/chat"
HELLO = [{"role": "user", "content": "hello"}]
MAX_BODY_BYTES = 4 << 20


class BadBody(NamedTuple):
    """param None: the refusal names no field, or any."""

    name: str
    make: Callable[[], bytes]
    status: int = 400
    param: str | None = None
    content_type: str = "application/json"


def with_fields(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": HELLO, **fields}).encode()


def with_text(field: str, text: str) -> bytes:
    """For values that json.dumps would not write."""
    return with_fields()[:-1] + f', "{field}": {text}}}'.encode()


NUMBERS = {  # field: below its range, above its range
    "temperature": ("-0.001", "2.001"),
    "top_p": ("0", "1.0001"),
    "min_p": ("-1e-9", "1.5"),
    "presence_penalty": ("-2.1", "2.1"),
    "frequency_penalty": ("-2.1", "2.1"),
    "repetition_penalty": ("0.0099", "5.01"),
    "top_k": ("-2", "1000"),
    "max_tokens": ("-1", "1000001"),
    "max_completion_tokens": ("-1", "1000001"),
    "min_tokens": ("-1", "1000001"),
    "n": ("0", "5"),
    "best_of": ("0", "21"),
    "seed": ("-1", "9223372036854776000"),
    "top_logprobs": ("-1", "21"),
    "priority": ("-2147483649", "2147483648"),
}
INTEGERS = list(NUMBERS)[6:]
FLAGS = [
    "stream",
    "logprobs",
    "ignore_eos",
    "include_stop_str_in_output",
    "continue_final_message",
    "add_generation_prompt",
    "parallel_tool_calls",
    "strict_fields",
]
OBJECTS = [
    "metadata",
    "logit_bias",
    "chat_template_kwargs",
    "response_format",
    "stream_options",
    "structured_outputs",
]
WRONG_FOR_A_NUMBER = {"text": '"0.5"', "flag": "true", "list": "[1]", "object": "{}"}
WRONG_FOR_A_FLAG = {"text": '"true"', "one": "1", "list": "[]"}
WRONG_FOR_AN_OBJECT = {"text": '"{}"', "list": "[]", "number": "1"}
NO_JSON = {"nan": "NaN", "infinity": "-Infinity", "huge": "1e999", "long": "1" * 5000}


def _of_numbers() -> Iterator[BadBody]:
    for field, bounds in NUMBERS.items():
        for side, text in zip(("below", "above"), bounds, strict=True):
            yield _text(f"{field} {side}", field, text)
        for name, text in WRONG_FOR_A_NUMBER.items():
            yield _text(f"{field} as {name}", field, text)
        for name, text in NO_JSON.items():
            yield BadBody(f"{field} {name}", lambda f=field, t=text: with_text(f, t))
    for field in INTEGERS:
        yield _text(f"{field} with a fraction", field, "1.0")


def _of_flags_and_objects() -> Iterator[BadBody]:
    for field in FLAGS:
        for name, text in WRONG_FOR_A_FLAG.items():
            yield _text(f"{field} as {name}", field, text)
    for field in OBJECTS:
        for name, text in WRONG_FOR_AN_OBJECT.items():
            yield _text(f"{field} as {name}", field, text)


def _text(name: str, field: str, text: str) -> BadBody:
    return BadBody(name, lambda: with_text(field, text), param=field)


MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("hello", "messages"),
    ([None], "messages[0]"),
    ([5], "messages[0]"),
    ([[]], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "robot", "content": "a"}], "messages[0].role"),
    ([{"role": None, "content": "a"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {}}], "messages[0].content"),
    ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": "a", "name": 5}], "messages[0].name"),
    ([*HELLO, {"role": "tool", "content": "a"}], "messages[1].tool_call_id"),
    ([*HELLO, {"role": "assistant", "tool_calls": [5]}], "messages[1].tool_calls[0]"),
    ([{"role": "user", "content": "a " * 5000}], "messages"),
    (HELLO * 300, "messages"),
    ([{"role": "user", "content": "a"}] * 100_000, "messages"),
]
OTHERS: list[tuple[str, Any, str]] = [
    ("model", None, "model"),
    ("model", 5, "model"),
    ("model", ["tiny/chat"], "model"),
    ("stop", "", "stop"),
    ("stop", 5, "stop"),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", [["a"]], "stop[0]"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("stop_token_ids", ["1"], "stop_token_ids[0]"),
    ("stop_token_ids", [2**31], "stop_token_ids[0]"),
    ("stop_token_ids", [304], "stop_token_ids[0]"),
    ("stop_token_ids", [1] * 1025, "stop_token_ids"),
    ("logit_bias", {"a": 1}, "logit_bias.a"),
    ("logit_bias", {"-1": 1}, "logit_bias.-1"),
    ("logit_bias", {"304": 1}, "logit_bias.304"),
    ("logit_bias", {"1": 100.5}, "logit_bias.1"),
    ("logit_bias", {"1": None}, "logit_bias.1"),
    ("logit_bias", {str(i): 0 for i in range(100_000)}, "logit_bias"),
    ("user", 5, "user"),
    ("tools", {}, "tools"),
    ("tools", [{"type": "x"}], "tools[0].type"),
    ("tools", [{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
    ("tool_choice", "perhaps", "tool_choice"),
    ("tool_choice", {"type": "function"}, "tool_choice"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("structured_outputs", {"regex": 5}, "structured_outputs.regex"),
    ("guided_json", 5, "guided_json"),
    ("guided_json", "{", "guided_json"),
    ("guided_regex", ["a"], "guided_regex"),
    ("guided_choice", [], "guided_choice"),
    ("guided_choice", [5], "guided_choice[0]"),
    ("guided_grammar", {}, "guided_grammar"),
    ("guided_grammar", "x" * 300_000, "guided_grammar"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("bad_words", ["a"], "bad_words"),
    ("prompt_logprobs", -1, "prompt_logprobs"),
    ("prompt_embeds", "AAAA", "prompt_embeds"),
    ("use_beam_search", True, "use_beam_search"),
    ("chat_template_kwargs", ["nobody"], "chat_template_kwargs"),
    ("service_tier", "gold", "service_tier"),
    ("reasoning_effort", "much", "reasoning_effort"),
]


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


DEEP_FIELDS = ["metadata", "guided_json", "chat_template_kwargs"]

BYTES: dict[str, bytes] = {
    "empty": b"",
    "spaces": b"   ",
    "NUL": b"\x00",
    "NULs": b"\x00" * 1000,
    "half an object": with_fields()[:-1],
    "two objects": with_fields() * 2,
    "a comma too many": with_fields()[:-1] + b",}",
    "a comment": with_fields() + b"// comment",
    "single quotes": b"{'model': 'm'}",
    "bare words": b"{model: m}",
    "form data": b"model=tiny&messages=hello",
    "XML": b"<model>tiny</model>",
    "a pickle": b"\x80\x04}\x94.",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "UTF-16": with_fields().decode().encode("utf-16"),
    "UTF-32": with_fields().decode().encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + with_fields(),
    "Latin-1": with_fields(user="x").replace(b'"x"', b'"\xe9"'),
    "cut UTF-8": with_fields(user="x").replace(b'"x"', b'"\xf0\x9f"'),
    "overlong UTF-8": with_fields(user="x").replace(b'"x"', b'"\xc0\xaf"'),
    "surrogate bytes": with_fields(user="x").replace(b'"x"', b'"\xed\xa0\x80"'),
    "a high surrogate": with_fields(user="x").replace(b'"x"', b'"\\ud800"'),
    "a low surrogate": with_fields(user="x").replace(b'"x"', b'"\\udc00"'),
    "a control character": with_fields(user="x").replace(b'"x"', b'"\x01"'),
    "a bare NUL in a text": with_fields(user="x").replace(b'"x"', b'"\x00"'),
    "a bad escape": with_fields(user="x").replace(b'"x"', b'"\\x41"'),
    "a leading zero": with_text("n", "01"),
    "a plus": with_text("n", "+1"),
    "hexadecimal": with_text("n", "0x1"),
    "a trailing dot": with_text("n", "1."),
    "random": bytes(range(256)) * 16,
    "a list": b"[]",
    "a text": b'"hello"',
    "a number": b"5",
    "null": b"null",
    "true": b"true",
    "deep lists": b"[" * 200_000,
    "deep whole lists": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 200_000,
    "deep messages": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
REPEATED: list[tuple[str, str]] = [
    ('{"model": "a", "messages": [], "model": "b"}', "model"),
    ('{"model": "a", "messages": [{"role": "user", "role": "system"}]}', "messages[0].role"),
    ('{"n": 1, "\\u006e": 2}', "n"),
    ('{"metadata": {"a": {"b": 1, "b": 1}}}', "metadata.a.b"),
]
LARGE: dict[str, Callable[[], bytes]] = {
    "50 MB of text": lambda: with_fields(user="x" * (50 << 20)),
    "50 MB of brackets": lambda: b"[" * (50 << 20),
    "50 MB of messages": lambda: with_fields(messages=HELLO * 1_200_000),
    "just too much": lambda: with_fields() + b" " * MAX_BODY_BYTES,
}
OTHER_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/octet-stream",
    "application/jsonp",
    "",
]


def _all() -> Iterator[BadBody]:
    yield from _of_numbers()
    yield from _of_flags_and_objects()
    for number, (messages, param) in enumerate(MESSAGES):
        make = lambda value=messages: with_fields(messages=value)  # noqa: E731
        yield BadBody(f"messages {number}", make, param=param)
    for number, (field, value, param) in enumerate(OTHERS):
        yield BadBody(
            f"{field} {number}", lambda f=field, v=value: with_fields(**{f: v}), param=param
        )
    for field in DEEP_FIELDS:
        yield BadBody(f"deep {field}", lambda f=field: with_fields(**{f: _deep(500)}), param=field)
    for name, data in BYTES.items():
        yield BadBody(name, lambda d=data: d)
    for text, param in REPEATED:
        yield BadBody(f"{param} twice", lambda t=text: t.encode(), param=param)
    for name, make_large in LARGE.items():
        yield BadBody(name, make_large, status=413)
    for content_type in OTHER_TYPES:
        yield BadBody(f"as {content_type}", with_fields, 415, content_type=content_type)
    yield BadBody("another model", lambda: with_fields(model="gpt-4"), 404, "model")
    yield BadBody(
        "an unknown field", lambda: with_fields(strict_fields=True, nobody=1), param="nobody"
    )


BAD_BODIES = list(_all())

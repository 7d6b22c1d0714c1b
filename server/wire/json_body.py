"""The bytes of a body -> one JSON object, or a refusal. Knows no field.

msgspec refuses what is not JSON: NaN, numbers beyond a double, half surrogates, bytes that are no
UTF-8. It keeps the last of two equal keys, so the standard library looks for those.
Source: RFC 8259; its section 4 leaves the meaning of repeated names open, so they are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from enginehouse.runtime.errors import RequestError

MAX_FREE_DEPTH = 64  # of the objects whose form is the sender's own: schemas, metadata


class _Repeating(dict[str, Any]):
    """An object of the body in which `key` stands twice."""

    key: str


def decode_json(body: bytes) -> dict[str, Any]:
    """The body's object; RequestError with code invalid_json, duplicate_key or invalid_type."""
    try:
        value = msgspec.json.decode(body)
        _refuse_repeated_keys(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError(
            "the body is nested too deeply; wanted an object of a few levels", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise RequestError(
            f"the body is {found_text(value)}; wanted a JSON object", code="invalid_type"
        )
    return value


def _refuse_repeated_keys(body: bytes) -> None:
    num_repeating = 0

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_repeating
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        num_repeating += 1
        repeating = _Repeating(made)
        counts = Counter(key for key, _ in pairs)
        repeating.key = next(key for key, count in counts.items() if count > 1)
        return repeating

    value = json.loads(body, object_pairs_hook=make)
    if num_repeating:
        path = _path_of_repeated(value)
        raise RequestError(
            f"{path[:200]}: found twice in one object; wanted each key once",
            param=path[:200],
            code="duplicate_key",
        )


def _path_of_repeated(value: object) -> str:
    """Where the first repeated key stands; the way there may lie in a value that was overwritten,
    and then the outer one is found.
    """
    waiting: list[tuple[str, object]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, _Repeating):
            return join(path, item.key)
        if isinstance(item, dict):
            waiting += [(join(path, key), part) for key, part in item.items()]
        elif isinstance(item, list):
            waiting += [(f"{path}[{index}]", part) for index, part in enumerate(item)]
    raise AssertionError("a repeated key was seen and not found")


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def is_too_deep(value: object, max_depth: int = MAX_FREE_DEPTH) -> bool:
    """Whether objects and lists stand in each other more than max_depth deep; never recurses."""
    level: list[object] = [value]
    for _ in range(max_depth):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        if not deeper:
            return False
        level = deeper
    return any(isinstance(item, (dict, list)) for item in level)


def found_text(value: object) -> str:
    """A short JSON-like picture of a value; never descends, so depth and size cannot hurt."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        cut = value if len(value) <= 60 else value[:57] + "..."
        return f'"{cut}"'
    if isinstance(value, (int, float)):
        text = str(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return "an object" if isinstance(value, dict) else "a list"

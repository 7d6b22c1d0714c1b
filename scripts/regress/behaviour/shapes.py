"""JSON answers -> the paths in them and the types at each, and what of those is gone.

An answer's own words change from build to build; which fields it has, and of what type, must not.
Knows no field but the few whose absence is the answer's and not the server's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# null or not as the answer turns out: it was no text, this ended it, that token is special.
_NULL_AT_TIMES = {
    *("content", "stop_reason", "finish_reason", "reasoning_content", "reasoning", "bytes")
}
_LEFT_OUT_AT_TIMES = {"reasoning_content", "reasoning"}  # there where a model thought
_BY_TOKEN = ("top_logprobs[]", "prompt_logprobs[]")  # objects whose keys are tokens: all one path
_NAMES: dict[type, str] = {
    **{bool: "boolean", int: "number", float: "number", str: "string"},
    **{type(None): "null", list: "array", dict: "object"},
}


class Changes(NamedTuple):
    """gone, added: paths. changed: path, its types before, its types now. num_old: paths before."""

    num_old: int
    gone: list[str]
    changed: list[tuple[str, str, str]]
    added: list[str]


def shape_of(answers: Iterable[Any]) -> list[str]:
    """Sorted lines like "choices[].message.content: string", of all of them together. What has
    several types has several lines.
    """
    return sorted({f"{path}: {kind}" for answer in answers for path, kind in _paths(answer, "")})


def _paths(value: Any, path: str) -> Iterator[tuple[str, str]]:
    yield path or "$", _NAMES[type(value)]
    if isinstance(value, dict):
        by_token = path.endswith(_BY_TOKEN) and "token" not in value
        for key, item in value.items():
            yield from _paths(item, f"{path}.{'*' if by_token else key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, f"{path}[]")


def compare_shapes(old: list[str], new: list[str]) -> Changes:
    """What a client that read the old answers would miss in the new ones.

    A path is not missed below a list that is empty this time, or an object that is null this time
    where the answer decides that. A type that is null beside another says nothing by itself.
    """
    was, now = _types(old), _types(new)
    gone = [path for path in was if path not in now and not _may_miss(path, was, now)]
    changed = []
    for path in was.keys() & now.keys():
        lost, won = was[path] - now[path] - {"null"}, now[path] - was[path] - {"null"}
        is_null = now[path] == {"null"} and _name(path) not in _NULL_AT_TIMES
        if lost and (won or is_null):
            changed.append((path, _told(was[path]), _told(now[path])))
    gone = [path for path in gone if not _within(path, {each for each, _, _ in changed})]
    outermost = [path for path in gone if not _within(path, set(gone) - {path})]
    added = sorted(path for path in now if path not in was)
    return Changes(len(was), sorted(outermost), sorted(changed), added)


def _types(lines: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lines:
        path, _, kind = line.rpartition(": ")
        found.setdefault(path, set()).add(kind)
    return found


def _may_miss(path: str, was: dict[str, set[str]], now: dict[str, set[str]]) -> bool:
    if _name(path) in _LEFT_OUT_AT_TIMES:
        return True
    for parent in _parents(path):
        if _name(parent) in _LEFT_OUT_AT_TIMES:
            return True
        if parent.endswith("[]") and parent not in now and "array" in now.get(parent[:-2], set()):
            return True
        if now.get(parent) == {"null"} and _name(parent) in _NULL_AT_TIMES:
            return True
    return path.endswith("[]") and "array" in now.get(path[:-2], set())


def _parents(path: str) -> Iterator[str]:
    """From the outermost: a, a[], a[].b of a[].b[].c."""
    for index, char in enumerate(path):
        if char == "." or (char == "[" and index):
            yield path[:index]


def _within(path: str, others: set[str]) -> bool:
    return any(parent in others for parent in _parents(path))


def _name(path: str) -> str:
    return path.rpartition(".")[2].partition("[")[0]


def _told(types: set[str]) -> str:
    return " or ".join(sorted(types))

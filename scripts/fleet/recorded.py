"""Requests that real people made: a trace as Mooncake's, a line of JSON each.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

timestamp: milliseconds from the start. hash_ids: of each 512 tokens of the prompt, a number that
stands for them and all before them, so that equal numbers are equal beginnings. What was said is
not in it. Source: Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025;
github.com/kvcache-ai/Mooncake, FAST25-release/traces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fleet.workload import Block, Request

BLOCK_TOKENS = 512  # that a number stands for


class Line(NamedTuple):
    when_s: float
    prompt_tokens: int
    answer_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """Tokens that are equal where the recorded ones were."""

    hash_ids: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        ranges = (range(name * BLOCK_TOKENS, (name + 1) * BLOCK_TOKENS) for name in self.hash_ids)
        return list(chain.from_iterable(ranges))

    def block(self, index: int, block_tokens: int) -> Block:
        """None but the prompt's own blocks are known again: who went on is a prompt of its own."""
        first = index * block_tokens
        name, inside = first // BLOCK_TOKENS, first % BLOCK_TOKENS
        if name < len(self.hash_ids):
            return (2, self.hash_ids[name], inside)
        return (3, self.hash_ids[-1], index)


class RecordedSource:
    """speed: so many times faster than it was recorded. ValueError for a file that is no trace."""

    clients = num_to_begin = 0

    def __init__(self, path: Path, speed: float = 1.0) -> None:
        self._lines = _read(path, speed)
        self._next = 0

    @property
    def seconds(self) -> float:
        """Until the last request has come."""
        return self._lines[-1].when_s

    def beginnings(self) -> Iterator[float]:
        return (line.when_s for line in self._lines)

    def begin(self, now: float) -> Request:
        line = self._lines[self._next]
        self._next += 1
        return Request(RecordedPrompt(line.hash_ids), line.prompt_tokens, line.answer_tokens, now)

    def follow(self, request: Request) -> None:
        """It came when it came."""


def _read(path: Path, speed: float) -> list[Line]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            each = json.loads(text)
            line = Line(
                each["timestamp"] / 1000 / speed,
                int(each["input_length"]),
                max(1, int(each["output_length"])),
                tuple(map(int, each["hash_ids"])),
            )
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: wanted a line of JSON with timestamp, input_length, "
                f"output_length and hash_ids, found {text[:60]!r}"
            ) from None
        if not 0 < line.prompt_tokens <= len(line.hash_ids) * BLOCK_TOKENS:
            raise ValueError(
                f"{path}:{number}: {line.prompt_tokens} tokens of a prompt are not what "
                f"{len(line.hash_ids)} hash_ids of {BLOCK_TOKENS} stand for"
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no requests")
    return sorted(lines, key=lambda line: line.when_s)

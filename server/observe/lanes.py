"""The sequences that this worker has with the engine, for who looks on: how far each has come.

An answer that begins and ends costs an entry of a dictionary; all else is read of it by who looks.
Knows no text of a request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from enginehouse.server.answer.choice import Choice
from enginehouse.server.answer.completion import Completion, Generation

_KEPT = 64  # that ended


class Lane(NamedTuple):
    """state: queued, prefill, decode, preempted (others need its room, and it waits to be computed
    again), or how it ended: stop, length, tool_calls, cancelled, error.

    age_s: since its request came; first_token_s: from then to the first token, where that is there.
    """

    request_id: str
    choice: int
    state: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    age_s: float
    first_token_s: float | None


class Lanes:
    """num_watchers: who looks now. What ended is kept as long as there is one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_watchers = self.num_ended = 0
        self._clock = clock
        self._open: dict[int, tuple[Completion, Generation | None, str]] = {}
        self._ended: deque[tuple[int, Lane]] = deque(maxlen=_KEPT)

    def begin(self, completion: Completion, generation: Generation | None, label: str) -> None:
        self._open[id(completion)] = completion, generation, label

    def end(self, completion: Completion) -> None:
        """Of one that was not begun: nothing."""
        found = self._open.pop(id(completion), None)
        if found is not None and self.num_watchers:
            for lane in self._lanes(*found, completion.unfinished_reason):
                self.num_ended += 1
                self._ended.append((self.num_ended, lane))

    def open(self) -> Iterator[Lane]:
        for completion, generation, label in list(self._open.values()):
            waits = "prefill" if generation is not None and generation.begun else "queued"
            yield from self._lanes(completion, generation, label, waits)

    def ended_after(self, number: int) -> list[Lane]:
        """The last of those that ended since num_ended was that number."""
        return [lane for ended, lane in self._ended if ended > number]

    def _lanes(
        self, completion: Completion, generation: Generation | None, label: str, otherwise: str
    ) -> Iterator[Lane]:
        began_s, first_s = completion.started_s, completion.first_token_s
        age_s = round(self._clock() - began_s, 3)
        num_prompt_tokens = completion.num_prompt_tokens
        preempted = generation.preempted if generation is not None else frozenset()
        for index, choice in enumerate(completion.choices):
            now = "preempted" if index in preempted else _state_of(choice, otherwise)
            state = choice.finish_reason or now
            cached, count = choice.num_cached_tokens, choice.num_tokens
            first_token_s = None if first_s is None or not count else round(first_s - began_s, 4)
            yield Lane(label, index, state, num_prompt_tokens, cached, count, age_s, first_token_s)


def _state_of(choice: Choice, otherwise: str) -> str:
    begins = otherwise in ("queued", "prefill")
    return "decode" if begins and choice.num_tokens else otherwise

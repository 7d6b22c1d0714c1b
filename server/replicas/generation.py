"""One request's choices, wherever they run: begun again elsewhere as long as nobody saw a token.

A sequence's result depends on its prompt, its sampling and its seed alone: another replica's is as
good. Knows neither files nor sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.host.client import Generation
from enginehouse.runtime.request import TokenOutput

log = logging.getLogger("enginehouse.replicas")

_MOST_TRIES = 4
Start = Callable[[Sequence[int], frozenset[str]], tuple[str, Generation]]


class ReplicaGeneration:
    """Has Generation's surface.

    start: runs these choices at a replica, none of the ones tried where that can be, and gives its
    name; it raises HostUnavailable when there is none.
    """

    def __init__(self, start: Start, num_choices: int) -> None:
        self._start = start
        self._choices = list(range(num_choices))  # of the running generation, by its own numbers
        self._cancelled: set[int] = set()
        self._tried: frozenset[str] = frozenset()
        self._num_tries = 0
        self._has_told = False
        self._begin()

    @property
    def finished(self) -> bool:
        return self._running.finished

    @property
    def begun(self) -> bool:
        return self._running.begun

    @property
    def preempted(self) -> frozenset[int]:
        return frozenset(self._choices[index] for index in self._running.preempted)

    @property
    def has_output(self) -> bool:
        return self._running.has_output

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        """As Generation.get; HostUnavailable for a replica that was lost after the first output, or
        when no other one can be asked.
        """
        while True:
            try:
                found = self._running.get(timeout_s)
            except HostUnavailable as error:
                if self._has_told or self._num_tries >= _MOST_TRIES:
                    raise
                log.warning("replica %s: %s; it is asked of another one", self.name, error)
                self._choices = [c for c in self._choices if c not in self._cancelled]
                self._begin()
                continue
            if found is None:
                return None
            self._has_told = True
            return self._choices[found[0]], found[1]

    def cancel(self, index: int | None = None) -> None:
        if index is None:
            self._cancelled.update(self._choices)
            self._running.cancel()
        elif index in self._choices:
            self._cancelled.add(index)
            self._running.cancel(self._choices.index(index))

    def _begin(self) -> None:
        self._num_tries += 1
        self.name, self._running = self._start(self._choices, self._tried)
        self._tried |= {self.name}

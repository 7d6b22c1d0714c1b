"""Prompts of one request that are computed so many at a time: a long list is not the whole queue.

Knows no form of an answer.
"""

from __future__ import annotations

from collections.abc import Callable

from gevent.lock import Semaphore

from enginehouse.runtime.request import TokenOutput
from enginehouse.server.answer.completion import Generation


class InTurn:
    """A generation that begins when it is first waited for and `room` has a place for it.

    start is called then; the place is given back at its end.
    """

    def __init__(self, start: Callable[[], Generation], room: Semaphore) -> None:
        self._start = start
        self._room = room
        self._generation: Generation | None = None
        self._cancelled = False

    @property
    def finished(self) -> bool:
        return self._cancelled if self._generation is None else self._generation.finished

    @property
    def begun(self) -> bool:
        return self._generation is not None and self._generation.begun

    @property
    def preempted(self) -> frozenset[int]:
        return frozenset() if self._generation is None else self._generation.preempted

    @property
    def has_output(self) -> bool:
        return self._generation is not None and self._generation.has_output

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        """As Generation's; its turn is waited for however long that takes."""
        if self._generation is None:
            self._room.acquire()
            try:
                self._generation = self._start()
            except BaseException:
                self._room.release()
                raise
        item = self._generation.get(timeout_s)
        if self._generation.finished:
            self._room.release()
        return item

    def cancel(self, index: int | None = None) -> None:
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel(index)

"""The running answers of several prompts as one request's. Knows no form of an answer."""

from __future__ import annotations

from gevent import Greenlet, killall, spawn
from gevent.queue import Empty, Queue

from enginehouse.runtime.request import TokenOutput
from enginehouse.server.answer.completion import Generation


class Batch:
    """The generations of several prompts as one; choices are numbered through.

    A greenlet waits for each, and all hand over to one queue. None in it: one has ended.
    """

    def __init__(self, generations: list[Generation], num_sequences: int) -> None:
        self._generations = generations
        self._num_sequences = num_sequences
        self._events: Queue[tuple[int, TokenOutput] | Exception | None] = Queue()
        self._num_waiting = len(generations)
        self._greenlets: list[Greenlet[..., None]] = [
            spawn(self._hand_over, number, generation)
            for number, generation in enumerate(generations)
        ]

    @property
    def finished(self) -> bool:
        """Nothing more will come, and all that came was taken."""
        return self._num_waiting == 0 and self._events.empty()

    @property
    def begun(self) -> bool:
        return any(generation.begun for generation in self._generations)

    @property
    def preempted(self) -> frozenset[int]:
        return frozenset(
            number * self._num_sequences + choice
            for number, generation in enumerate(self._generations)
            for choice in generation.preempted
        )

    @property
    def has_output(self) -> bool:
        return not self._events.empty() and isinstance(self._events.peek_nowait(), tuple)

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        """The next (choice, output); None after timeout_s, or once all have ended."""
        while not self.finished:
            try:
                event = self._events.get(timeout=timeout_s)
            except Empty:
                return None
            if isinstance(event, Exception):
                raise event
            if event is not None:
                return event
        return None

    def cancel(self, index: int | None = None) -> None:
        if index is not None:
            number, choice = divmod(index, self._num_sequences)
            self._generations[number].cancel(choice)
            return
        killall(self._greenlets, block=False)
        for generation in self._generations:
            generation.cancel()
        self._num_waiting = 0
        self._events.put(None)  # wakes a greenlet that waits in get()

    def _hand_over(self, number: int, generation: Generation) -> None:
        first = number * self._num_sequences
        try:
            while (item := generation.get()) is not None:
                index, output = item
                self._events.put((first + index, output))
                if generation.finished:
                    break
        except Exception as error:  # raised again where the answer is made
            self._events.put(error)
        self._num_waiting -= 1
        self._events.put(None)

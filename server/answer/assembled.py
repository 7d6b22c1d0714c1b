"""An answer in a form that is put together from parts, with an event for each: whole, it is what
its events add up to.

Knows no form.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from contextlib import closing
from typing import Any

from enginehouse.server.answer.completion import Completion, Delta, Generation


class AssembledCompletion(Completion):
    """events: made, and not told yet."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.events: list[dict[str, Any]] = []

    @abstractmethod
    def take(self, delta: Delta) -> None:
        """What is new becomes part of the answer, and events."""

    def run(
        self, generation: Generation | None, silence_s: float | None = None
    ) -> Generator[Delta | None, None, None]:
        with closing(super().run(generation, silence_s)) as deltas:
            for delta in deltas:
                if delta is not None:
                    self.take(delta)
                yield delta

    def told(self, delta: Delta) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events

"""Who may join an engine's queue, and how long anybody waits there: the bounds of one host.

A sequence waits from its submission to its first output, and is open to its last. Knows no socket
and no executor.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from enginehouse.runtime.request import Refusal

_REMEMBERED = 256  # ends, of which the rate is taken
_RATE_S = 60.0  # ends that are older say nothing of now
_UNKNOWN_S, _LONGEST_S = 5, 300
_SHARE = 0.1  # of the queue that should be free when a refused client comes back


class QueueLimits(NamedTuple):
    """max_requests: open sequences beyond those that run at once. max_tokens: of prompts that wait.
    max_wait_s: until its prompt is begun.
    """

    max_requests: int = 1024
    max_tokens: int = 1_000_000
    max_wait_s: float = 600.0


class Admission:
    """at_once: sequences that the engine runs together. clock: seconds, any origin."""

    def __init__(
        self, limits: QueueLimits, at_once: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self._max_open = at_once + limits.max_requests
        self._clock = clock
        self._open: set[int] = set()
        self._waiting: dict[int, tuple[float, int]] = {}  # id -> since when, tokens; oldest first
        self._num_tokens = 0
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def full(self) -> bool:
        """Whether a request of one short sequence would be refused."""
        return self.refusal(1, 1) is not None

    @property
    def retry_after_s(self) -> int:
        """Seconds until a tenth of the queue is free, at the rate of the last minute's ends."""
        now = self._clock()
        while self._ends and now - self._ends[0] > _RATE_S:
            self._ends.popleft()
        if len(self._ends) < 2:
            return _UNKNOWN_S
        rate = len(self._ends) / max(now - self._ends[0], 1e-3)
        too_many = len(self._open) - self._max_open + max(1.0, _SHARE * self.limits.max_requests)
        return min(max(math.ceil(too_many / rate), 1), _LONGEST_S)

    def refusal(self, num_sequences: int, num_tokens: int) -> Refusal | None:
        """Why a request is not taken, or None. A prompt that waits alone is never too long."""
        if num_sequences > self._max_open:
            return Refusal(
                f"found {num_sequences} sequences in one request; this server holds "
                f"{self._max_open} at once, running or waiting",
                "n",
                "invalid_value",
            )
        if len(self._open) + num_sequences > self._max_open:
            found = f"{len(self._open)} sequences run or wait here, of at most {self._max_open}"
            seconds = self.retry_after_s
        elif self._waiting and self._num_tokens + num_tokens > self.limits.max_tokens:
            found = (
                f"the prompts that wait have {self._num_tokens} tokens, of at most "
                f"{self.limits.max_tokens}"
            )
            seconds = max(self.retry_after_s, _UNKNOWN_S)  # the rate is of sequences, not of tokens
        else:
            return None
        return Refusal(
            f"the queue is full: {found}; send the request again in {seconds} s",
            code="queue_full",
            status=429,
            retry_after_s=seconds,
        )

    def join(self, sequence: int, num_tokens: int) -> None:
        self._open.add(sequence)
        self._waiting[sequence] = self._clock(), num_tokens
        self._num_tokens += num_tokens

    def begin(self, sequence: int) -> None:
        """It has its first output."""
        _, num_tokens = self._waiting.pop(sequence, (0.0, 0))
        self._num_tokens -= num_tokens

    def leave(self, sequence: int) -> None:
        """It has ended, or was cancelled."""
        self.begin(sequence)
        if sequence in self._open:
            self._open.remove(sequence)
            self._ends.append(self._clock())

    def overdue(self) -> list[int]:
        """Those that have waited for too long."""
        latest = self._clock() - self.limits.max_wait_s
        found = []
        for sequence, (since, _) in self._waiting.items():
            if since > latest:
                break
            found.append(sequence)
        return found

    def timeout(self) -> Refusal:
        """What an overdue one is told."""
        return Refusal(
            f"the prompt was not begun within {self.limits.max_wait_s:g} s, as others were before "
            "it; send the request again",
            code="queue_timeout",
            status=503,
            retry_after_s=self.retry_after_s,
        )

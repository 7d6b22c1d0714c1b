"""One replica: a batch of so many slots, a queue before it, and the blocks that it keeps.

It computes one prompt at a time, in chunks, while those that answer get a token each step. Between
two changes (a prompt done, an answer done, a request come) all steps are alike, so that they are
one event. What is there is counted in blocks, the least recently used go first.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from math import ceil

from fleet.service import ServiceTimes
from fleet.workload import Block, Request


class Replica:
    """advance and take return when to look at it again; None: it has nothing to do."""

    def __init__(self, name: str, times: ServiceTimes, draw: random.Random) -> None:
        self.name, self._times, self._draw = name, times, draw
        self.is_up = True
        self.version = 0  # of what was said of when to look again: older words do not count
        self._waiting: deque[Request] = deque()
        self._prefill: Request | None = None
        self._running: list[Request] = []
        self._kept: OrderedDict[Block, None] = OrderedDict()
        self._began_s = 0.0
        self._steps, self._step_s = 0, 0.0  # of the segment at work; none: 0

    @property
    def load(self) -> int:
        return len(self._waiting) + len(self._running) + (self._prefill is not None)

    def take(self, request: Request, now: float) -> float | None:
        """A request comes; it is looked at behind the step that is at work."""
        self._waiting.append(request)
        if not self._steps:
            return self._begin(now)
        if self._prefill is not None or self._num_free() <= 0 or self._steps == 1:
            return None  # the segment ends as it would have
        gone = (now - self._began_s) / self._step_s
        steps = min(self._steps, int(gone) + 1)
        if steps == self._steps:
            return None
        self._steps, self.version = steps, self.version + 1
        return self._began_s + steps * self._step_s

    def advance(self, now: float) -> tuple[list[Request], float | None]:
        """The segment is over: the answers that are done, and when the next one will be."""
        done = []
        for request in self._running:
            request.left -= self._steps
            if request.left == 0:
                request.done_s = now
                done.append(request)
        if done:
            self._running = [request for request in self._running if request.left]
        if self._prefill is not None:
            self._compute(self._prefill, now, done)
        for request in done:
            self._keep(request, request.prompt_tokens + request.answer_tokens)
        return done, self._begin(now)

    def fail(self) -> tuple[list[Request], list[Request]]:
        """It dies: the requests without a token, and those that have begun."""
        begun = list(self._running)
        others = [*([self._prefill] if self._prefill else []), *self._waiting]
        self._waiting.clear()
        self._running, self._prefill, self._steps = [], None, 0
        self._kept.clear()
        self.is_up, self.version = False, self.version + 1
        return others, begun

    def _num_free(self) -> int:
        return self._times.slots - len(self._running) - (self._prefill is not None)

    def _begin(self, now: float) -> float | None:
        """The next segment."""
        if self._prefill is None and self._waiting and self._num_free() > 0:
            self._prefill = self._waiting.popleft()
            self._admit(self._prefill)
        decoding = min((request.left for request in self._running), default=0)
        self._step_s = self._times.step(len(self._running))
        if self._prefill is not None:
            left, chunk = self._prefill.left, self._times.chunk
            self._steps = ceil(left / chunk)
            self._step_s += left / self._steps / self._times.prefill_tokens_per_s
            if decoding:
                self._steps = min(self._steps, decoding)
        else:
            self._steps = decoding
        if self._times.jitter:
            self._step_s *= self._draw.lognormvariate(0.0, self._times.jitter)
        self._began_s, self.version = now, self.version + 1
        return now + self._steps * self._step_s if self._steps else None

    def _admit(self, request: Request) -> None:
        """What of its prompt is there need not be computed; its last token always is."""
        found = 0
        for block in blocks_of(request, request.prompt_tokens, self._times.block_tokens):
            if block not in self._kept:
                break
            self._kept.move_to_end(block)
            found += 1
        cached = min(found * self._times.block_tokens, request.prompt_tokens - 1)
        request.cached_tokens, request.left = cached, request.prompt_tokens - cached

    def _compute(self, request: Request, now: float, done: list[Request]) -> None:
        """The segment's part of the prompt; behind its last token stands the answer's first."""
        computed = ceil(request.left / ceil(request.left / self._times.chunk)) * self._steps
        request.left = max(0, request.left - computed)
        if request.left:
            return
        self._prefill = None
        self._keep(request, request.prompt_tokens)
        request.first_token_s = now
        request.left = request.answer_tokens - 1
        if request.left:
            self._running.append(request)
        else:
            request.done_s = now
            done.append(request)

    def _keep(self, request: Request, num_tokens: int) -> None:
        for block in blocks_of(request, num_tokens, self._times.block_tokens):
            self._kept[block] = None
            self._kept.move_to_end(block)
        while len(self._kept) > self._times.cache_blocks:
            self._kept.popitem(last=False)


def blocks_of(request: Request, num_tokens: int, block_tokens: int) -> Iterator[Block]:
    """Names of the full blocks of the first tokens."""
    block = request.conversation.block
    return (block(index, block_tokens) for index in range(num_tokens // block_tokens))

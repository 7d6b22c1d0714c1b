"""Requests that TensorRT-LLM has not been given yet, in the order in which it is to get them.

It knows no priorities and takes whatever it is given: what it has at once is decided here.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from enginehouse.runtime.request import GIVES_WAY, Request

MOST_SCORED = 4  # sequences at once whose prompt's logits are held, all of them, in memory

_Heap = list[tuple[int, int, Request]]  # priority, arrival


def is_scored(request: Request) -> bool:
    """Whether log probabilities of its prompt are wanted."""
    return request.sampling.num_prompt_logprobs is not None


class Waiting:
    """By priority, then arrival; those whose prompts are scored hold up no others."""

    def __init__(self) -> None:
        self._heaps: dict[bool, _Heap] = {False: [], True: []}
        self._num_arrivals = 0

    def push(self, request: Request) -> None:
        self._num_arrivals += 1
        entry = (request.priority, self._num_arrivals, request)
        heapq.heappush(self._heaps[is_scored(request)], entry)

    def pop(self, given: Sequence[Request]) -> Request | None:
        """The next one, None where there is none. given: those that run. While one of them does not
        give way, those that do go on waiting.
        """
        someone_comes_first = any(request.priority < GIVES_WAY for request in given)
        heaps = [self._heaps[False]]
        if sum(map(is_scored, given)) < MOST_SCORED:
            heaps.append(self._heaps[True])
        first = min(filter(None, heaps), key=lambda heap: heap[0][:2], default=None)
        if first is None or (someone_comes_first and first[0][2].priority >= GIVES_WAY):
            return None
        return heapq.heappop(first)[2]

    def clear(self) -> None:
        for heap in self._heaps.values():
            heap.clear()

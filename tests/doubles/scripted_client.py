"""The engine client's scripted twin: every generation plays the same list of outputs.

A script holds (choice, TokenOutput), None for a moment of silence, or an exception; after it
the generation is silent until it is cancelled. A prompt that is to be scored is, before the script
begins, in two outputs: a token's logprob is -id / 100, and its neighbours are the likeliest. A
prompt that is pooled has no script: `scripted_vector` is its embedding.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable

from gevent.event import Event

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    Pooling,
    Refusal,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)

Script = Iterable["tuple[int, TokenOutput] | None | Exception"]


class ScriptedGeneration:
    def __init__(self, script: Script, num_choices: int = 1) -> None:
        self._script = deque(script)
        self._open = set(range(num_choices))
        self.cancels: list[int | None] = []
        self.begun = False
        self.preempted: frozenset[int] = frozenset()
        self.ended = Event()

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def has_output(self) -> bool:
        return bool(self._script) and isinstance(self._script[0], tuple)

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        while self._script:
            item = self._script.popleft()
            if isinstance(item, Exception):
                raise item
            if item is None or item[0] in self._open:
                self._open -= {item[0]} if item and item[1].finish_reason else set()
                return item
        self.ended.wait(timeout_s)
        return None

    def cancel(self, index: int | None = None) -> None:
        if gone := self._open & (self._open if index is None else {index}):
            self.cancels.append(index)
            self._open -= gone
        if not self._open:
            self.ended.set()


class ScriptedClient:
    def __init__(self, info: EngineInfo, script: Script = (), ready: bool = True) -> None:
        self.info, self.ready, self.script = info, ready, list(script)
        self.stands_still = False
        self.begun = False  # of every generation: its prompt is being computed
        self.pools = True
        self.no_room: Refusal | None = None
        self.stats = ExecutorStats(
            num_running=3,
            num_kv_blocks=10,
            num_free_kv_blocks=4,
            num_remembered_kv_blocks=3,
            num_draft_tokens=7,
            num_accepted_tokens=5,
            iterations_s=1.5,
            num_in_iterations=4,
        )
        self.submitted: list[tuple[list[int], list[SamplingParams]]] = []
        self.priorities: list[int] = []
        self.labels: list[str] = []
        self.generations: list[ScriptedGeneration] = []

    def check_room(self) -> None:
        if self.no_room is not None:
            raise self.no_room.error()

    def submit(
        self,
        prompt_ids: list[int],
        samplings: list[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> ScriptedGeneration:
        if not self.ready:
            raise HostUnavailable("the script says so")
        self.submitted.append((prompt_ids, samplings))
        self.priorities.append(priority)
        self.labels.append(label)
        script = [*prompt_scores(prompt_ids, samplings[0].num_prompt_logprobs), *self.script]
        if (pooling := samplings[0].pooling) is not None and self.pools:
            script = [(0, pooled_output(prompt_ids, pooling))]
        self.generations.append(ScriptedGeneration(script, len(samplings)))
        self.generations[-1].begun = self.begun
        return self.generations[-1]


def scripted_vector(prompt_ids: list[int]) -> list[float]:
    """Of 4 numbers, which float32 has."""
    return [float(len(prompt_ids)), float(prompt_ids[0]), float(prompt_ids[-1]), 0.5]


def pooled_output(prompt_ids: list[int], pooling: Pooling) -> TokenOutput:
    told = scripted_vector(prompt_ids)[: pooling.dimensions]
    vector = struct.pack(f"<{len(told)}f", *told)
    return TokenOutput(1, [], FinishReason.STOP, embedding=vector, queued_s=0.25)


def prompt_scores(prompt_ids: list[int], num_top: int | None) -> list[tuple[int, TokenOutput]]:
    if num_top is None:
        return []
    scores = [
        TokenLogprobs(-i / 100, tuple((i + 1 + n, -n / 10) for n in range(num_top)), rank=i)
        for i in prompt_ids[1:]
    ]
    half = len(scores) // 2
    return [(0, TokenOutput(1, prompt_logprobs=part)) for part in (scores[:half], scores[half:])]

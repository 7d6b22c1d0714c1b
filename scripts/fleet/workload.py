"""Who asks what, and when: conversations whose prompts grow, arriving evenly or in bursts.

A conversation's first prompt is a system prompt that others have too, and words of its own; every
further one is all of that, the answer and more. Its next turn comes when the answer has been read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Block = tuple[int, int, int]
Arrivals = Literal["poisson", "bursty"]


@dataclass(frozen=True, slots=True)
class Workload:
    """conversations_per_s: that begin. bursts: this many times the mean rate, for burst_s at a time
    on average, in the share of time that keeps the mean; between them nothing. turns, *_tokens:
    means; turns are geometric, tokens exponential, but answers as they are where fixed_answers.
    systems: system prompts there are, of system_tokens each. think_s: between an answer's end and
    the next turn, exponential. clients: so many people who each lead num_conversations, one after
    another, of as many turns and tokens as the means say; 0: conversations begin by themselves.
    """

    conversations_per_s: float
    arrivals: Arrivals = "poisson"
    bursts: float = 5.0
    burst_s: float = 5.0
    turns: float = 5.0
    systems: int = 8
    system_tokens: int = 512
    user_tokens: float = 96.0
    answer_tokens: float = 128.0
    fixed_answers: bool = False
    think_s: float = 10.0
    clients: int = 0
    num_conversations: int = 3


@dataclass(slots=True)
class Conversation:
    """ids: all of it so far. system: which prompt it began with; system_tokens of ids are that.
    draw: its own, so that it says the same whichever replica answers, and whenever.
    """

    number: int
    ids: list[int]
    turns_left: int
    system: int
    system_tokens: int
    draw: random.Random

    def block(self, index: int, block_tokens: int) -> Block:
        """The name of one: a system prompt's are everyone's who has it."""
        if (index + 1) * block_tokens <= self.system_tokens:
            return (0, self.system, index)
        return (1, self.number, index)


class Said(Protocol):
    """A conversation, or a prompt of one that was recorded."""

    @property
    def ids(self) -> list[int]:
        """Its tokens so far."""

    def block(self, index: int, block_tokens: int) -> Block:
        """What block number `index` of it is called: the same, where it is the same."""


@dataclass(slots=True)
class Request:
    """One turn. *_s: when; None: not yet, or never."""

    conversation: Said
    prompt_tokens: int
    answer_tokens: int
    arrived_s: float
    first_token_s: float | None = None
    done_s: float | None = None
    cached_tokens: int = 0
    retries: int = 0
    error: str | None = None
    replica: str = ""
    left: int = 0  # prompt tokens while it is computed, then tokens of the answer


class DrawnSource:
    """Draws all of it; the same seed gives the same."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self.workload, self.clients = workload, workload.clients
        self.num_to_begin = workload.clients * workload.num_conversations
        self._random, self._seed = random.Random(seed), seed
        self._count = 0
        draw = random.Random(f"systems of {seed}")
        self._systems = [
            [draw.getrandbits(31) for _ in range(workload.system_tokens)]
            for _ in range(workload.systems)
        ]

    def beginnings(self) -> Iterator[float]:
        """The moments at which conversations begin, in seconds, for ever."""
        work, draw, now = self.workload, self._random, 0.0
        if work.arrivals == "poisson":
            while True:
                now += draw.expovariate(work.conversations_per_s)
                yield now
        while True:  # silence, then a burst
            now += draw.expovariate(1 / (work.burst_s * (work.bursts - 1)))
            end = now + draw.expovariate(1 / work.burst_s)
            while True:
                now += draw.expovariate(work.conversations_per_s * work.bursts)
                if now > end:
                    now = end
                    break
                yield now

    def begin(self, now: float) -> Request:
        """The first turn of a new conversation."""
        work, self._count = self.workload, self._count + 1
        self.num_to_begin -= 1
        draw = random.Random(f"{self._count} of {self._seed}")
        system = draw.randrange(work.systems) if work.systems else 0
        ids = list(self._systems[system]) if work.systems else []
        turns = round(work.turns) if work.clients else 1
        while not work.clients and work.turns > 1 and draw.random() > 1 / work.turns:
            turns += 1
        conversation = Conversation(self._count, ids, turns, system, len(ids), draw)
        return self._turn(conversation, now)

    def follow(self, request: Request) -> tuple[float, Request] | None:
        """When the conversation goes on behind an answer, and with what; None: it is over."""
        conversation = request.conversation
        assert isinstance(conversation, Conversation)
        if conversation.turns_left == 0 or request.done_s is None:
            return None
        self._say(conversation, request.answer_tokens)
        then = request.done_s
        if self.workload.think_s:
            then += conversation.draw.expovariate(1 / self.workload.think_s)
        return then, self._turn(conversation, then)

    def _turn(self, conversation: Conversation, now: float) -> Request:
        work, conversation.turns_left = self.workload, conversation.turns_left - 1
        asked = _tokens(conversation.draw, work.user_tokens)
        answer = _tokens(conversation.draw, work.answer_tokens)
        self._say(conversation, round(work.user_tokens) if work.clients else asked)
        if work.fixed_answers or work.clients:
            answer = round(work.answer_tokens)
        return Request(conversation, len(conversation.ids), answer, now)

    def _say(self, conversation: Conversation, num_tokens: int) -> None:
        bits = conversation.draw.getrandbits
        conversation.ids.extend(bits(31) for _ in range(num_tokens))


def _tokens(draw: random.Random, mean: float) -> int:
    return max(1, round(draw.expovariate(1 / mean)))

"""Replicas behind a router, on a clock: a heap of what happens next.

A front knows each replica's load as it was when it last asked, and what it has sent there since. A
request whose replica dies before its first token is sent elsewhere; one that has begun is an error,
as it is to a client (docs/replicas.md).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fleet.outcome import Outcome, outcome_of
from fleet.replica import Replica
from fleet.service import ServiceTimes
from fleet.workload import Request


class Source(Protocol):
    """Who asks what, and when. clients: who lead conversations of which num_to_begin are left, one
    after another; 0: they begin by the clock.
    """

    clients: int
    num_to_begin: int

    def beginnings(self) -> Iterator[float]: ...
    def begin(self, now: float) -> Request: ...
    def follow(self, request: Request) -> tuple[float, Request] | None: ...


class Router(Protocol):
    def choose(self, prompt_ids: list[int], loads: dict[str, float]) -> str: ...
    def forget(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """seconds: for which conversations begin and turns are taken; what runs then is let end.
    warm_s: whose requests are not counted. fronts: each with a router of its own; any is asked.
    stale_s: how old loads may be that a front knows. mtbf_s: of one replica; None: none fails.
    mttr_s: until it is back, empty. max_retries: of one request.
    """

    num_replicas: int
    seconds: float = 600.0
    warm_s: float = 60.0
    fronts: int = 1
    stale_s: float = 0.0
    mtbf_s: float | None = None
    mttr_s: float = 30.0
    max_retries: int = 3
    seed: int = 0


class Front:
    """A router, and the loads as it knows them."""

    def __init__(self, router: Router, fleet: Fleet, stale_s: float) -> None:
        self.router = router
        self._fleet, self._stale_s = fleet, stale_s
        self._loads: dict[str, float] = {}
        self._asked_s: float | None = None

    def choose(self, request: Request, now: float) -> str | None:
        loads = self._known(now)
        if not loads:
            return None
        prompt = request.conversation.ids
        if len(prompt) != request.prompt_tokens:
            prompt = prompt[: request.prompt_tokens]
        name = self.router.choose(prompt, loads)
        loads[name] += 1
        return name

    def _known(self, now: float) -> dict[str, float]:
        if self._asked_s is None or now - self._asked_s >= self._stale_s:
            self._asked_s = now
            up = (replica for replica in self._fleet.replicas.values() if replica.is_up)
            self._loads = {replica.name: float(replica.load) for replica in up}
        return self._loads

    def forget(self, name: str) -> None:
        """A closed connection is known at once."""
        self.router.forget(name)
        self._loads.pop(name, None)


class Fleet:
    """One run; `run` is called once."""

    def __init__(
        self,
        settings: FleetSettings,
        times: ServiceTimes,
        source: Source,
        make_router: Callable[[], Router],
    ) -> None:
        self._settings = settings
        self._source = source
        self._failures = random.Random(settings.seed + 1)  # the same whatever is asked
        names = [f"replica-{index}" for index in range(settings.num_replicas)]
        self.replicas = {
            name: Replica(name, times, random.Random(f"{name} of {settings.seed}"))
            for name in names
        }
        self._fronts = [
            Front(make_router(), self, settings.stale_s) for _ in range(settings.fronts)
        ]
        self._connections = random.Random(settings.seed + 2)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._requests: list[Request] = []

    def run(self) -> Outcome:
        if self._source.clients:
            for _ in range(self._source.clients):
                self._begin_next(0.0)
        else:
            self._next_beginning(self._source.beginnings())
        if self._settings.mtbf_s is not None:
            for replica in self.replicas.values():
                self._next_failure(replica, 0.0)
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return outcome_of(self._requests, self._settings.warm_s, self._settings.seconds)

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _next_beginning(self, moments: Iterator[float]) -> None:
        when = next(moments, math.inf)
        if when >= self._settings.seconds:
            return

        def begin(now: float) -> None:
            self._arrive(self._source.begin(now), now)
            self._next_beginning(moments)

        self._at(when, begin)

    def _begin_next(self, now: float) -> None:
        """Of clients, as long as one has a conversation left to lead."""
        if self._source.num_to_begin > 0:
            self._arrive(self._source.begin(now), now)

    def _arrive(self, request: Request, now: float) -> None:
        self._requests.append(request)
        self._send(request, now)

    def _send(self, request: Request, now: float) -> None:
        name = self._connections.choice(self._fronts).choose(request, now)
        if name is None:
            request.error = "no replica"
            return
        request.replica = name
        replica = self.replicas[name]
        self._look_again(replica, replica.take(request, now))

    def _look_again(self, replica: Replica, when: float | None) -> None:
        if when is None:
            return
        version = replica.version

        def look(now: float) -> None:
            if replica.version != version:
                return
            done, then = replica.advance(now)
            self._look_again(replica, then)
            for request in done:
                self._follow(request)

        self._at(when, look)

    def _follow(self, request: Request) -> None:
        following = self._source.follow(request)
        if following is not None and following[0] < self._settings.seconds:
            when, next_one = following
            self._at(when, lambda now: self._arrive(next_one, now))
        elif request.done_s is not None:
            self._begin_next(request.done_s)

    def _next_failure(self, replica: Replica, now: float) -> None:
        assert self._settings.mtbf_s is not None
        when = now + self._failures.expovariate(1 / self._settings.mtbf_s)
        if when < self._settings.seconds:
            self._at(when, lambda then: self._fail(replica, then))

    def _fail(self, replica: Replica, now: float) -> None:
        unanswered, begun = replica.fail()
        for front in self._fronts:
            front.forget(replica.name)
        for request in begun:
            request.error = "replica lost"
        for request in unanswered:
            request.retries += 1
            if request.retries > self._settings.max_retries:
                request.error = "replica lost"
            else:
                self._send(request, now)

        def come_back(then: float) -> None:
            replica.is_up = True
            self._next_failure(replica, then)

        self._at(now + self._settings.mttr_s, come_back)

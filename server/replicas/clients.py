"""Many engine hosts as one: what a worker asks of its engine, asked of the replicas a file names.

    who answers     those of the engine whose tokenizer the worker loaded; of others only where the
                    file names none of it, and then the worker sees that its engine was replaced
    which of them   the router's, of those that are ready and have room
    who is left     is asked nothing new, and what it runs is read to its end

All calls come from greenlets of one hub. Knows neither text nor HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gevent

from enginehouse.runtime.errors import EnginehouseError, HostUnavailable, RequestError
from enginehouse.runtime.host.client import EngineClient, Generation
from enginehouse.runtime.host.keys import HostKey
from enginehouse.runtime.request import EngineInfo, ExecutorStats, SamplingParams
from enginehouse.server.replicas.generation import ReplicaGeneration
from enginehouse.server.replicas.prefix_router import PrefixRouter, Router
from enginehouse.server.replicas.replicas_file import Replica, read_replicas, stamp

log = logging.getLogger("enginehouse.replicas")

_LOOK_S = 0.1
_LOOKS_A_COUNT = 5  # of what other workers have there, between two of which the host's stats come
_STARTING = "no replica of the engine is ready; try again shortly"
_NOT_SUMMED = {"kv_blocks", "preempted"}


@dataclass(slots=True)
class _Asked:
    """A replica that this worker is connected to. num_others: sequences of other workers there."""

    replica: Replica
    client: EngineClient
    num_others: int = 0
    was_ready: bool = False
    left: bool = False

    @property
    def load(self) -> float:
        return self.client.num_open + self.num_others

    def count_others(self) -> None:
        stats = self.client.stats
        self.num_others = max(0, stats.num_running + stats.num_waiting - self.client.num_open)

    def has_room(self) -> bool:
        try:
            self.client.check_room()
        except RequestError:
            return False
        return True


class ReplicaClients:
    """Has EngineClient's surface.

    path: of the replicas file; it may come later. digest: the engine whose tokenizer this worker
    loaded; None: any. key: as EngineClient's. is_open: hosts that ask for none may be reached over
    the network. router None: by prefixes.
    """

    def __init__(
        self,
        path: Path,
        digest: str | None = None,
        key: HostKey | None = None,
        is_open: bool = False,
        router: Router | None = None,
        open_client: Callable[[str, HostKey | None], EngineClient] = EngineClient,
    ) -> None:
        self.address = str(path)
        self._path, self._digest = path, digest
        self._key, self._is_open = key, is_open
        self._router: Router = PrefixRouter() if router is None else router
        self._open_client = open_client
        self._stamp: tuple[int, int] | None = None
        self._asked: dict[str, _Asked] = {}
        self._leaving: list[_Asked] = []
        self._info: EngineInfo | None = None
        self._read()
        self._greenlet = gevent.spawn(self._look)

    @property
    def ready(self) -> bool:
        return any(each.client.ready for each in self._asked.values())

    @property
    def stands_still(self) -> bool:
        """Whether every replica does."""
        ready = [each.client for each in self._asked.values() if each.client.ready]
        return bool(ready) and all(client.stands_still for client in ready)

    @property
    def info(self) -> EngineInfo:
        """Of a replica that is ready, else the last one seen; its name's order decides which."""
        for name in sorted(self._asked):
            if self._asked[name].client.ready:
                self._info = self._asked[name].client.info
                break
        if self._info is None:
            raise HostUnavailable(_STARTING)
        return self._info

    @property
    def stats(self) -> ExecutorStats:
        """All of them together."""
        return _sum([client.stats for client in self.replicas().values()])

    def replicas(self) -> Mapping[str, EngineClient]:
        """By name, those that are named now, ready or not, and those that still end."""
        found = {each.replica.name: each.client for each in self._leaving}
        found |= {name: each.client for name, each in self._asked.items()}
        return dict(sorted(found.items()))

    def check_room(self) -> None:
        """RequestError while no replica has room, as far as this worker has heard."""
        ready = [each for each in self._asked.values() if each.client.ready]
        if ready and not any(each.has_room() for each in ready):
            ready[0].client.check_room()

    def submit(
        self,
        prompt_ids: list[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> ReplicaGeneration:
        """As EngineClient's; a replica that is lost before an output gives it to another one."""

        def start(choices: Sequence[int], tried: frozenset[str]) -> tuple[str, Generation]:
            each = self._choose(prompt_ids, tried)
            asked = [samplings[choice] for choice in choices]
            started = each.client.submit(prompt_ids, asked, priority, label)
            return each.replica.name, started

        return ReplicaGeneration(start, len(samplings))

    def close(self) -> None:
        self._greenlet.kill()
        for each in [*self._asked.values(), *self._leaving]:
            each.client.close()

    def _choose(self, prompt_ids: list[int], tried: frozenset[str]) -> _Asked:
        ready = {name: each for name, each in self._asked.items() if each.client.ready}
        for lost in tried & ready.keys():  # it may be back already, and others may not be ready
            if len(ready) > 1:
                del ready[lost]
        if not ready:
            raise HostUnavailable(_STARTING)
        roomy = {name: each for name, each in ready.items() if each.has_room()} or ready
        loads = {name: each.load for name, each in roomy.items()}
        return roomy[self._router.choose(prompt_ids, loads)]

    def _look(self) -> None:
        looks = 0
        while True:
            gevent.sleep(_LOOK_S)
            looks += 1
            if looks % _LOOKS_A_COUNT == 0:
                for each in self._asked.values():
                    each.count_others()
            self._read()
            self._forget_lost()
            for each in [each for each in self._leaving if not each.client.num_open]:
                self._leaving.remove(each)
                each.client.close()

    def _forget_lost(self) -> None:
        for name, each in self._asked.items():
            if each.was_ready and not each.client.ready:
                log.warning("replica %s is lost", name)
                self._router.forget(name)
            each.was_ready = each.client.ready

    def _read(self) -> None:
        """Where the file was written anew. One that cannot be read changes nothing."""
        found = stamp(self._path)
        if found is None or found == self._stamp:
            return
        self._stamp = found
        try:
            named = read_replicas(self._path)
        except EnginehouseError as error:
            log.error("%s; the replicas stay as they are", error)
            return
        named = tuple(each for each in named if self._may_ask(each))
        own = [each for each in named if self._digest in (None, each.digest) or not each.digest]
        wanted = {each.name: each for each in own or named}
        for name, asked in list(self._asked.items()):
            if wanted.get(name) != asked.replica:
                del self._asked[name]
                self._router.forget(name)
                self._leaving.append(asked)
        for name in wanted.keys() - self._asked.keys():
            client = self._open_client(wanted[name].address, self._key)
            self._asked[name] = _Asked(wanted[name], client)

    def _may_ask(self, replica: Replica) -> bool:
        """Who reaches a host without a key runs what they like on it: such a host is asked where
        that is said to be meant.
        """
        if replica.address.startswith("ipc://") or self._key is not None or self._is_open:
            return True
        log.error(
            "replica %s at %s is not asked: set ENGINEHOUSE_HOST_KEY_FILE, or "
            "ENGINEHOUSE_OPEN_HOST=1 where the network lets nobody in",
            *(replica.name, replica.address),
        )
        return False


def _sum(stats: Sequence[ExecutorStats]) -> ExecutorStats:
    """Of moments and counters; which block is where, and what does not come from every one, is not
    told.
    """
    if len(stats) == 1:
        return stats[0]
    summed: dict[str, Any] = {}
    for each in fields(ExecutorStats):
        values = [getattr(one, each.name) for one in stats]
        if each.name not in _NOT_SUMMED and values:
            summed[each.name] = None if None in values else sum(values)
    return ExecutorStats(**summed)

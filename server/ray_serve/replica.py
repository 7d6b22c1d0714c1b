"""What Ray Serve runs as a replica: one engine host, its health, its load and its end.

    starts    a host on a free TCP port, with the key that its clients have
    lives     it is in the directory; Serve asks for its health: the host's heartbeat
    is asked  by Serve's autoscaling: what runs and waits at the host
    ends      leaves the directory, waits until the host has nothing to do, ends it

Does not import Ray: a directory is whatever has `put` and `remove`.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.host.keys import read_key
from enginehouse.runtime.host.supervisor import HostSupervisor, host_command
from enginehouse.server.replicas.host_load import HostLoad
from enginehouse.server.replicas.replicas_file import Replica

_START_S = 1200.0
_LINGER_S = 3.0  # in which a front that is not up to date may still ask it
_UNHEARD_S = 2.0  # until the host's next two words about its load
_POLL_S = 0.2


class Directory(Protocol):
    """Where fronts look replicas up."""

    def put(self, replica: Replica) -> None:
        """It is there for a while; to be called again before that is over."""

    def remove(self, name: str) -> None: ...


class EngineReplica:
    """Serve calls check_health, record_autoscaling_stats and __del__ by their names.

    engine: a directory that each node finds at the same path. key_file: see read_key. host: the
    address at which fronts reach this node; None: the one it reaches others from. flags: of
    enginehouse-host. max_drain_s: what it runs may take so long once it is to end. Raises
    EngineError when the host cannot serve the engine.
    """

    def __init__(
        self,
        engine: str,
        key_file: str,
        open_directory: Callable[[], Directory],
        host: str | None = None,
        flags: Sequence[str] = (),
        max_drain_s: float = 600.0,
    ) -> None:
        self._directory = open_directory()
        self._key, self._host = read_key(Path(key_file)), host or _own_address()
        self._name, self._max_drain_s = uuid.uuid4().hex[:12], max_drain_s
        self._replica: Replica | None = None
        self._load: HostLoad | None = None
        self._told, self._failures, self._facts = threading.Event(), list[str](), dict[str, Any]()
        command = host_command(engine, "tcp://0.0.0.0:0", "--key-file", key_file, *flags)
        self._supervisor = HostSupervisor(command, self._ready, self._failed, tries_once=True)
        self._supervisor.start()
        if not self._told.wait(_START_S):
            self._failures.append(f"{engine} was not ready in {_START_S:g} s")
        if self._failures:
            self._supervisor.stop()
            raise EngineError(self._failures[0])
        self._enter()

    def check_health(self) -> None:
        """RuntimeError while its host has ended, or stood still and was ended: unless another is
        there soon, Serve replaces the replica.
        """
        if not self._supervisor.is_up or self._replica is None:
            raise RuntimeError(f"the engine host of replica {self._name} ended")
        self._directory.put(self._replica)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Sequences that run and that wait."""
        running, waiting = self._load.latest if self._load else (0, 0)
        return {"num_running": float(running), "num_waiting": float(waiting)}

    def __del__(self) -> None:
        if getattr(self, "_replica", None) is not None:
            self.drain()

    def drain(self) -> None:
        """Asked nothing new, it ends what it runs, and then its host."""
        if self._supervisor.is_up:
            time.sleep(_LINGER_S)
        self._replica = None
        self._directory.remove(self._name)
        if self._supervisor.is_up:
            time.sleep(_UNHEARD_S)
        end_s = time.monotonic() + self._max_drain_s
        while self._is_busy() and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        self._supervisor.stop()
        if self._load is not None:
            self._load.close()

    def _is_busy(self) -> bool:
        return self._supervisor.is_up and self._load is not None and self._load.latest.total > 0

    def _enter(self) -> None:
        """A host takes requests: the first, or the one after it, at another port."""
        port = str(self._facts["address"]).rpartition(":")[2]
        if self._load is not None:
            self._load.close()
        self._load = HostLoad(f"tcp://127.0.0.1:{port}", self._key)
        self._replica = Replica(self._name, f"tcp://{self._host}:{port}", self._facts["digest"])
        self._directory.put(self._replica)

    def _ready(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        if not self._told.is_set():
            self._told.set()
        elif self._replica is not None:  # else it is to end
            self._enter()

    def _failed(self, reason: str) -> None:
        self._failures.append(reason)
        self._told.set()


def _own_address() -> str:
    """Of the interface that leads to other machines; the loopback's where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

"""The engine hosts of one server: one, and while its engine is exchanged two.

At SIGHUP the engine's folder may hold, or lead to, another engine. Its host is started beside the
one that runs and, once it is ready, new workers are given its address; the old one ends with the
last worker that asks it. What cannot be loaded changes nothing. Knows no gunicorn.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from enginehouse.runtime.engine import is_hf_checkpoint, read_engine, read_manifest
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host.supervisor import HostSupervisor, host_command
from enginehouse.server.launch.process_settings import host_flags, watchdog_s

log = logging.getLogger("enginehouse.launch")

_START_S = 1200.0
Announce = Callable[[dict[str, Any]], None]


class Running(NamedTuple):
    """engine: the folder itself, whatever led to it. digest: of what was in it."""

    supervisor: HostSupervisor
    address: str
    engine: Path
    digest: str | None


class Hosts:
    """run_dir: private, for their sockets. announce: is given a host's facts once it is ready."""

    def __init__(self, run_dir: Path, announce: Announce) -> None:
        self._run_dir = run_dir
        self._announce = announce
        self._asked: Path | None = None  # as the environment names it: a link may lead elsewhere
        self._running: Running | None = None
        self._retired: list[tuple[Running, int]] = []
        self._count = 0

    def start(self, address: str, give_up: Callable[[str], None]) -> None:
        """The first. give_up: is told why it cannot serve its engine."""
        self._asked = Path(os.environ["ENGINEHOUSE_ENGINE"])
        self._running = self._host(address, self._announce, give_up)
        self._running.supervisor.start()

    def exchange(self, last_worker: int) -> str | None:
        """Load what the folder holds now, if that is another engine; the address for workers that
        are younger than `last_worker`, or None where nothing changed. Waits until it is ready.
        """
        if self._running is None or self._asked is None:
            return None
        os.environ["ENGINEHOUSE_ENGINE"] = str(self._asked)
        try:
            if check_engine(self._asked) == self._running.digest:
                return None
            log.info("another engine is in %s: it is loaded beside the one that runs", self._asked)
            found = self._load_beside()
        except EnginehouseError as error:
            log.error("%s; the engine that runs stays", error)
            os.environ["ENGINEHOUSE_ENGINE"] = str(self._running.engine)
            return None
        self._retired.append((self._running, last_worker))
        self._running = found
        return found.address

    def retire(self, oldest_worker: int | None) -> None:
        """End hosts that no worker asks any more. oldest_worker: that is left; None: none is."""
        for old in list(self._retired):
            running, last_worker = old
            if oldest_worker is None or oldest_worker > last_worker:
                self._retired.remove(old)
                log.info("no worker asks the engine %s any more: its host ends", running.engine)
                threading.Thread(target=running.supervisor.stop, daemon=True).start()

    def stop(self) -> None:
        for running, _ in self._retired:
            running.supervisor.stop()
        if self._running is not None:
            self._running.supervisor.stop()

    def _load_beside(self) -> Running:
        """Raises EnginehouseError when it cannot be loaded, as where memory holds only one."""
        self._count += 1
        ended, failures = threading.Event(), list[str]()

        def ready(facts: dict[str, Any]) -> None:
            self._announce(facts)
            ended.set()

        def failed(reason: str) -> None:
            failures.append(reason)
            ended.set()

        found = self._host(f"ipc://{self._run_dir}/engine-{self._count}", ready, failed)
        found.supervisor.start()
        seconds = float(os.environ.get("ENGINEHOUSE_START_S") or _START_S)
        if not ended.wait(seconds):
            failures.append(f"{found.engine} was not ready in {seconds:g} s")
        if failures:
            found.supervisor.stop()
            raise EnginehouseError(failures[0])
        return found

    def _host(self, address: str, ready: Announce, failed: Callable[[str], None]) -> Running:
        assert self._asked is not None
        engine = self._asked.resolve()
        command = host_command(engine, address, *host_flags(os.environ))
        supervisor = HostSupervisor(command, ready, failed, watchdog_s(os.environ))
        return Running(supervisor, address, engine, check_engine(engine))


def check_engine(path: Path) -> str | None:
    """The digest of an engine that can be served. Raises EnginehouseError for what cannot."""
    manifest = read_manifest(path)
    if not is_hf_checkpoint(manifest):
        read_engine(path)
    return manifest.digest

"""The engine hosts of one server: one a replica, and while its engine is exchanged twice as many.

At SIGHUP the engine's folder may hold, or lead to, another engine. Its hosts are started beside
those that run and, once all are ready, new workers are given them; the old ones end with the last
worker that asks them. What no worker or host could start with changes nothing. Several replicas are
named in a file, which workers read as it changes. Knows no gunicorn.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from enginehouse.runtime.engine import is_hf_checkpoint, read_engine, read_manifest
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host.supervisor import HostSupervisor, host_command
from enginehouse.server.launch.process_settings import host_flags, watchdog_s
from enginehouse.server.launch.shares import shares_of
from enginehouse.server.replicas.replicas_file import Replica, write_replicas

log = logging.getLogger("enginehouse.launch")

_START_S = 1200.0
_CHECK = """
import sys
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.prompt.chat import load_chat
from enginehouse.server.settings import ServerSettings
try:
    settings = ServerSettings.from_environment()
    load_chat(settings.engine_dir, settings.tool_format, settings.reasoning_format)
except EnginehouseError as error:
    sys.exit(str(error))
"""
Announce = Callable[[dict[str, Any]], None]


class Running(NamedTuple):
    """engine: the folder itself, whatever led to it. digest: of what was in it."""

    supervisors: list[HostSupervisor]
    addresses: list[str]
    engine: Path
    digest: str | None

    def start(self) -> None:
        for each in self.supervisors:
            each.start()

    def stop(self) -> None:
        """All at once: each may take its time."""
        ending = [threading.Thread(target=each.stop, daemon=True) for each in self.supervisors]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()


class Hosts:
    """run_dir: private, for their sockets. announce: is given a host's facts once all are ready,
    and each time that one of them is again.
    """

    def __init__(self, run_dir: Path, announce: Announce, num_replicas: int = 1) -> None:
        self._run_dir = run_dir
        self._announce = announce
        self._num_replicas = num_replicas
        self._named = _Named(run_dir / "replicas.json")
        self._asked = Path(os.environ["ENGINEHOUSE_ENGINE"])  # a link may lead elsewhere one day
        self._running: Running | None = None
        self._loading: threading.Thread | None = None
        self._next: Running | None = None
        self._retired: list[tuple[Running, int]] = []
        self._count = 0

    def start(self, address: str, give_up: Callable[[str], None]) -> None:
        """The first. give_up: is told why it cannot serve its engine."""
        self._running = self._host(address, self._announce, give_up)
        os.environ["ENGINEHOUSE_ENGINE"] = str(self._running.engine)
        self._running.start()

    def reload(self, last_worker: int, again: Callable[[], None]) -> bool:
        """Whether new workers may be started now, with what the environment says by then.

        Another engine in the place of the one that runs is loaded first, which takes a while: then
        `again` is called, by a thread, and this is to be asked again. last_worker: the age of the
        youngest worker that asks the engine that runs. Raises EnginehouseError for settings, an
        engine or a template that no worker could start with.
        """
        if self._running is None:
            return True
        if self._loading is not None and self._loading.is_alive():
            log.info("another engine is being loaded already")
            return False
        if self._next is not None:
            self._retired.append((self._running, last_worker))
            self._running, self._next = self._next, None
            os.environ["ENGINEHOUSE_ENGINE"] = str(self._running.engine)
            os.environ["ENGINEHOUSE_HOST_ADDRESS"] = self._running.addresses[0]
            return True
        check_worker(self._asked)
        if check_engine(self._asked) == self._running.digest:
            return True
        log.info("another engine is in %s: it is loaded beside the one that runs", self._asked)
        self._loading = threading.Thread(target=self._load_beside, args=(again,), daemon=True)
        self._loading.start()
        return False

    def retire(self, oldest_worker: int | None) -> None:
        """End hosts that no worker asks any more. oldest_worker: that is left; None: none is."""
        for old in list(self._retired):
            running, last_worker = old
            if oldest_worker is None or oldest_worker > last_worker:
                self._retired.remove(old)
                log.info("no worker asks the engine %s any more: its host ends", running.engine)
                self._named.remove(running.addresses)
                threading.Thread(target=running.stop, daemon=True).start()

    def stop(self) -> None:
        for each in (*(old for old, _ in self._retired), self._next, self._running):
            if each is not None:
                each.stop()

    def _load_beside(self, again: Callable[[], None]) -> None:
        self._count += 1
        ended, failures = threading.Event(), list[str]()

        def ready(facts: dict[str, Any]) -> None:
            self._announce(facts)
            ended.set()

        def failed(reason: str) -> None:
            failures.append(reason)
            ended.set()

        address = f"ipc://{self._run_dir}/engine-{self._count}"
        found = self._host(address, ready, failed, tries_once=True)
        found.start()
        seconds = float(os.environ.get("ENGINEHOUSE_START_S") or _START_S)
        if not ended.wait(seconds):
            failures.append(f"{found.engine} was not ready in {seconds:g} s")
        if failures:
            found.stop()
            self._named.remove(found.addresses)
            log.error("%s; the engine that runs stays", failures[0])
            return
        self._next, self._loading = found, None
        again()

    def _host(
        self,
        address: str,
        ready: Announce,
        failed: Callable[[str], None],
        *,
        tries_once: bool = False,
    ) -> Running:
        engine = self._asked.resolve()
        digest = check_engine(engine)
        waiting, lock = set(range(self._num_replicas)), threading.Lock()

        def take(number: int, at: str, facts: dict[str, Any]) -> None:
            if self._num_replicas > 1:
                self._named.add(Replica(Path(at).name, at, digest))
            with lock:
                waiting.discard(number)
                is_all = not waiting
            if is_all:
                ready(facts)

        supervisors, addresses = [], []
        for number, share in enumerate(shares_of(engine, self._num_replicas, os.environ)):
            at = address if self._num_replicas == 1 else f"{address}-{number}"
            addresses.append(at)
            supervisors.append(
                HostSupervisor(
                    host_command(engine, at, *host_flags(os.environ), *share.flags),
                    partial(take, number, at),
                    failed,
                    watchdog_s(os.environ),
                    tries_once,
                    share.env,
                )
            )
        return Running(supervisors, addresses, engine, digest)


class _Named:
    """The replicas file, of hosts that were ready once; clients find one that is started again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replicas: set[Replica] = set()
        self._lock = threading.Lock()

    def add(self, replica: Replica) -> None:
        with self._lock:
            if replica not in self._replicas:
                self._replicas.add(replica)
                write_replicas(self._path, self._replicas)

    def remove(self, addresses: list[str]) -> None:
        with self._lock:
            left = {each for each in self._replicas if each.address not in addresses}
            if left != self._replicas:
                self._replicas = left
                write_replicas(self._path, left)


def check_worker(engine: Path) -> None:
    """EnginehouseError for what no worker could start with: gunicorn ends with the first of them.

    Asked of a process of its own: the master forks, and loads no tokenizer.
    """
    env = {**os.environ, "ENGINEHOUSE_ENGINE": str(engine)}
    done = subprocess.run([sys.executable, "-c", _CHECK], env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise EnginehouseError(said[-1])


def check_engine(path: Path) -> str | None:
    """The digest of an engine that can be served. Raises EnginehouseError for what cannot."""
    manifest = read_manifest(path)
    if not is_hf_checkpoint(manifest):
        read_engine(path)
    return manifest.digest

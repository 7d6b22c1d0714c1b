"""The engine hosts of one server: one, and while its engine is exchanged two.

At SIGHUP the engine's folder may hold, or lead to, another engine. Its host is started beside the
one that runs and, once it is ready, new workers are given its address; the old one ends with the
last worker that asks it. What no worker or host could start with changes nothing. Knows no
gunicorn.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
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

    supervisor: HostSupervisor
    address: str
    engine: Path
    digest: str | None


class Hosts:
    """run_dir: private, for their sockets. announce: is given a host's facts once it is ready."""

    def __init__(self, run_dir: Path, announce: Announce) -> None:
        self._run_dir = run_dir
        self._announce = announce
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
        self._running.supervisor.start()

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
            os.environ["ENGINEHOUSE_HOST_ADDRESS"] = self._running.address
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
                threading.Thread(target=running.supervisor.stop, daemon=True).start()

    def stop(self) -> None:
        for each in (*(old for old, _ in self._retired), self._next, self._running):
            if each is not None:
                each.supervisor.stop()

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
        found.supervisor.start()
        seconds = float(os.environ.get("ENGINEHOUSE_START_S") or _START_S)
        if not ended.wait(seconds):
            failures.append(f"{found.engine} was not ready in {seconds:g} s")
        if failures:
            found.supervisor.stop()
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
        command = host_command(engine, address, *host_flags(os.environ))
        silence_s = watchdog_s(os.environ)
        supervisor = HostSupervisor(command, ready, failed, silence_s, tries_once)
        return Running(supervisor, address, engine, check_engine(engine))


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

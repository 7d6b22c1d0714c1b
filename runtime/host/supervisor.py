"""Keeps an engine host running: starts it, tells when it is ready, restarts it when it dies.

Lives in gunicorn's master as one thread that only waits. It imports no torch and no ZeroMQ,
so that the master may go on forking workers.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from enginehouse.runtime.host.heartbeat import BEAT_S

log = logging.getLogger("enginehouse.supervisor")

DEFAULT_SILENCE_S = 120.0
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 30.0
_STABLE_AFTER_S = 60.0  # a host that lived this long starts with the first delay again


# A worker forked while a host is being spawned would keep the spawn's pipes open for life, and
# subprocess would wait for their end as long: forks and spawns take turns.
_fork_or_spawn = threading.Lock()
os.register_at_fork(
    before=_fork_or_spawn.acquire,
    after_in_parent=_fork_or_spawn.release,
    after_in_child=_fork_or_spawn.release,
)


def host_command(engine_dir: Path | str, address: str, *flags: str) -> list[str]:
    """The command line of an engine host: the script beside this interpreter, else on PATH."""
    beside = Path(sys.executable).with_name("enginehouse-host")
    script = str(beside) if beside.exists() else shutil.which("enginehouse-host")
    return [script or str(beside), str(engine_dir), "--address", address, *flags]


class HostSupervisor:
    """Owns the host process.

    on_ready is called with the engine's facts each time a host takes requests; on_failure with
    a sentence when the first host cannot serve its engine at all (restarting would not help).
    Both run on the supervisor's thread. silence_s: a host that takes requests and sends no
    heartbeat for so long stands still, and is ended. tries_once: a first host that ends before it
    is ready, without a word, has failed too. env: variables of the host beside this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_ready: Callable[[dict[str, Any]], None],
        on_failure: Callable[[str], None],
        silence_s: float = DEFAULT_SILENCE_S,
        tries_once: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._env = dict(env or {})
        self._tries_once = tries_once
        self._silence_s = silence_s
        self._command = list(command)
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False
        self._is_up = False
        self._thread = threading.Thread(target=self._run, name="host-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether a host takes requests, as far as its heartbeat says."""
        return self._is_up

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the host: SIGTERM, and SIGKILL to its process group after timeout_s."""
        self._stopping.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process is not None:
                self._signal(self._process, number)
            self._thread.join(timeout_s)
            if not self._thread.is_alive():
                return

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)  # the host leads its own group
            except ProcessLookupError:
                pass

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._stopping.is_set():
            started_s = time.monotonic()
            try:
                failure = self._run_host_once()
            except (OSError, ValueError) as error:  # no such script, no process left, half a line
                failure = f"the engine host cannot be started: {error}"
            if self._stopping.is_set():
                return
            if failure is None and self._tries_once and not self._was_ready:
                failure = "the engine host ended before it was ready, as where memory ends"
            if failure is not None and not self._was_ready:
                self._on_failure(failure)
                return
            if time.monotonic() - started_s > _STABLE_AFTER_S:
                delay_s = _FIRST_DELAY_S
            log.error("the engine host stopped; it is started again in %.2f s", delay_s)
            self._stopping.wait(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _run_host_once(self) -> str | None:
        """One life of the host. Returns why it could not serve its engine, if it said so."""
        process, reader = self._spawn()
        self._process = process
        if self._stopping.is_set():  # stop() may have looked before there was a process
            self._signal(process, signal.SIGTERM)
        failure = None
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            line = pipe.readline()  # empty when the host died before it said anything
            if line:
                facts = json.loads(line)
                failure = facts.get("error")
                if failure is None:
                    self._was_ready = True
                    self._is_up = True
                    self._on_ready(facts)
                    self._watch(process, pipe)
        self._is_up = False
        process.wait()  # gunicorn may reap it first; that counts as its end too
        return failure

    def _watch(self, process: subprocess.Popen[bytes], pipe: FileIO) -> None:
        """Read the heartbeat until the host ends by itself, or stands still and is ended.

        Silence is counted by waits, not by a clock: this process may have been the one that stood.
        """
        silent_s = 0.0
        while process.poll() is None:
            if select.select([pipe], [], [], BEAT_S)[0]:
                silent_s = 0.0
                if not pipe.read(4096):
                    return
            elif silent_s < self._silence_s:
                silent_s += BEAT_S
            else:
                log.error("the engine host stood still for %g s and is ended", silent_s)
                self._signal(process, signal.SIGKILL)
                return

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """A new host, and the end of the pipe on which it reports."""
        with _fork_or_spawn:
            reader, writer = os.pipe()
            try:
                process = subprocess.Popen(
                    [*self._command, "--ready-fd", str(writer)],
                    pass_fds=[writer],
                    env={**os.environ, **self._env},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C in the terminal is gunicorn's alone
                )
            finally:
                os.close(writer)
        return process, reader

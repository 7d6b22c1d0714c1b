"""The engine host: killed, stopped, wedged, out of memory, unable to load; and its socket."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import psutil

from breaks.case import Case, Fault
from breaks.clients import Crowd, Seen, ask, summary
from breaks.server import NeverHappened

_WATCHDOG = {"ENGINEHOUSE_WATCHDOG_S": "4"}
_ROOM_BYTES = 256 << 20
_FEW_S = 15.0  # what a client waits for its error, at most, where nothing hangs


def _host(case: Case) -> psutil.Process:
    found = case.server.host()
    if found is None:
        raise NeverHappened("there is no engine host")
    return found


def _broken_by(number: signal.Signals, longest_s: float = _FEW_S, room: int | None = None):
    """A signal to the host, while four clients ask for streams."""

    def run(case: Case) -> None:
        host = _host(case)
        crowd = Crowd(case.port, 4, 400, stream=True)
        case.wait(lambda: case.server.num_running > 0, "it runs")
        if room is not None:
            limit = host.memory_info().vms + room
            resource.prlimit(host.pid, resource.RLIMIT_AS, (limit, limit))
        host.send_signal(number)
        broken_s = time.monotonic()
        case.wait(lambda: case.server.host() not in (None, host), "another host is started")
        case.wait(case.server.is_ready, "ready again")
        seen = crowd.stop()
        case.recovered(broken_s)
        _judge(case, seen, longest_s)

    return run


def _judge(case: Case, seen: list[Seen], longest_s: float) -> None:
    """Each client was answered, or told why not, and nobody waited for longer."""
    case.saw = summary(seen)
    unclear = {each.what for each in seen} - {"200"}
    unclear = {what for what in unclear if "engine_unavailable" not in what}
    case.want(not unclear, f"not a clear error: {', '.join(sorted(unclear))}")
    case.want(any(each.what != "200" for each in seen), "no client saw it: nothing was broken")
    case.want(max(each.seconds for each in seen) < longest_s, f"a client waited {longest_s:g} s")
    case.want(ask(case.port).what == "200", "it answers again")


def fails_to_load(case: Case) -> None:
    """The engine's folder is gone when the host is killed, and is put back after three tries."""
    engine = case.engine.resolve()
    away = engine.rename(engine.with_name("away"))
    _host(case).kill()
    broken_s = time.monotonic()
    tried = "enginehouse-host: "
    case.wait(lambda: case.server.log.count(tried) >= 3, "three hosts say that they cannot load")
    seen = [ask(case.port) for _ in range(3)]
    away.rename(engine)
    back_s = time.monotonic()
    case.wait(case.server.is_ready, "ready again")
    case.recovery_s = time.monotonic() - back_s
    case.saw = f"{summary(seen)}; three failed starts took {back_s - broken_s:.1f} s"
    case.want({each.what for each in seen} == {"503 engine_unavailable"}, "a clear 503 meanwhile")
    case.want(ask(case.port).what == "200", "it answers again")


def socket_removed(case: Case) -> None:
    """Its file, as cleaners of /tmp do: a worker that comes later finds nobody."""
    _socket(case).unlink()
    seen = [ask(case.port)]
    worker = case.server.workers()[0]
    worker.kill()
    broken_s = time.monotonic()
    case.wait(lambda: worker.pid not in [each.pid for each in case.server.workers()], "it ended")
    case.recovered(broken_s)
    seen.append(ask(case.port))
    case.saw = summary(seen)
    case.want({each.what for each in seen} == {"200"}, "it answers before and after")


def _socket(case: Case) -> Path:
    words = _host(case).cmdline()
    return Path(words[words.index("--address") + 1].removeprefix("ipc://"))


FAULTS = [
    Fault("host-killed", _broken_by(signal.SIGKILL), quick=False),
    Fault("host-stopped", _broken_by(signal.SIGSTOP), _WATCHDOG, quick=False),
    Fault("host-wedged", _broken_by(signal.SIGUSR1), _WATCHDOG, quick=False),
    Fault("host-leaks", _broken_by(signal.SIGUSR2, room=_ROOM_BYTES), quick=False),
    Fault("host-cannot-load", fails_to_load, copy=True),
    Fault("socket-removed", socket_removed),
]

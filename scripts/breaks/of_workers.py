"""Workers and their master: killed, wedged, stopped and reloaded under load; a clock that jumps."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

from breaks.case import Case, Fault
from breaks.clients import Crowd, ask, summary

_TIMEOUT_S = 10  # workers have to start in it too
_DAY_S = 86_400
# What a client sees whose worker ends under it: there is nobody left to tell it more.
_LOST = {"ConnectionResetError", "RemoteDisconnected", "IncompleteRead", "200, cut"}


def _lost_by(number: signal.Signals):
    """One of two workers: its clients lose their connection, and the others nothing."""

    def run(case: Case) -> None:
        crowd = Crowd(case.port, 8, 100, stream=True)
        case.wait(lambda: len(crowd.seen) > 8, "they ask")
        worker = case.server.workers()[0]
        worker.send_signal(number)
        broken_s = time.monotonic()

        def replaced() -> bool:
            pids = [each.pid for each in case.server.workers()]
            return worker.pid not in pids and len(pids) == 2

        case.wait(replaced, "another worker is there", 4 * _TIMEOUT_S + 20)
        seen = crowd.stop()
        case.recovered(broken_s)
        case.saw = summary(seen)
        found = {each.what for each in seen}
        case.want("200" in found, "the other worker answers")
        case.want(found <= {"200", *_LOST}, "its clients lose their connection and no more")

    return run


def clock_jumps(case: Case) -> None:
    """The wall clock, a day ahead and two back, in every process and under load."""
    crowd = Crowd(case.port, 4, 100, stream=True)
    case.wait(lambda: len(crowd.seen) > 4, "they ask")
    pids = [case.server.process.pid, *(each.pid for each in case.server.workers())]
    for seconds in (_DAY_S, -_DAY_S):
        (case.folder / "clock").write_text(str(seconds))
        seen = len(crowd.seen)
        case.wait(lambda seen=seen: len(crowd.seen) > seen + 8, "they are answered")
        case.want(case.server.is_ready(), "it is ready")
    seen = crowd.stop()
    case.saw = summary(seen)
    case.want({each.what for each in seen} == {"200"}, "all are answered")
    now = [case.server.process.pid, *(each.pid for each in case.server.workers())]
    case.want(now == pids, "no process was ended")
    case.want(case.server.stop() == 0, "it ends as asked")


def sigterm_under_load(case: Case) -> None:
    crowd = Crowd(case.port, 4, 400, stream=True)
    case.wait(lambda: case.server.num_running >= 4, "they run")
    case.server.process.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    case.wait(lambda: case.server.process.poll() is not None, "it ends")
    ended_s = time.monotonic() - asked_s
    seen = crowd.stop()
    case.saw = f"{summary(seen)}; ended in {ended_s:.1f} s"
    case.want(case.server.process.returncode == 0, "its status is 0")
    found = {each.what for each in seen}
    case.want(found <= {"200", "ConnectionRefusedError"}, "what it took is answered")


def sighup_under_load(case: Case) -> None:
    """To another engine in the link's place: no request is lost."""
    old = case.server.host()
    crowd = Crowd(case.port, 4, 200, stream=True)
    case.wait(lambda: len(crowd.seen) > 4, "they ask")
    other = case.folder / "other"
    shutil.copytree(case.engine.resolve(), other)
    _rename(other, "another")
    link = case.folder / "link"
    link.symlink_to(other)
    link.replace(case.engine)
    case.server.process.send_signal(signal.SIGHUP)
    broken_s = time.monotonic()
    case.wait(lambda: case.server.host() not in (None, old) and not old.is_running(), "exchanged")
    case.recovery_s = time.monotonic() - broken_s
    seen = crowd.stop()
    case.saw = summary(seen)
    case.want({each.what for each in seen} == {"200"}, "no request is lost")
    case.want(ask(case.port).what == "200", "the new engine answers")


def _rename(engine: Path, name: str) -> None:
    """Another digest makes it another engine."""
    path = engine / "manifest.json"
    text = path.read_text(encoding="utf-8")
    head, _, tail = text.rpartition('"digest": "sha256:')
    path.write_text(f'{head}"digest": "sha256:{"0" * 8}{tail[8:]}', encoding="utf-8")


def _clock(folder: Path, env: dict[str, str]) -> None:
    (folder / "clock").write_text("0")
    env["BREAK_CLOCK"] = str(folder / "clock")


FAULTS = [
    Fault("worker-killed", _lost_by(signal.SIGKILL), workers=2, quick=False),
    Fault(
        "worker-wedged",
        _lost_by(signal.SIGSTOP),
        {"GUNICORN_CMD_ARGS": f"--timeout {_TIMEOUT_S}"},
        workers=2,
        quick=False,
    ),
    Fault("clock-jumps", clock_jumps, prepare=_clock),
    Fault("sigterm-under-load", sigterm_under_load, quick=False),
    Fault("sighup-under-load", sighup_under_load, copy=True, quick=False),
]

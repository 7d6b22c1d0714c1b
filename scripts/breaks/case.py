"""What a fault is: a function that is given a running server, breaks it, and says what it saw."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from breaks.server import NeverHappened, Server, wait_until


@dataclass
class Case:
    """One fault's run. folder: its own. engine: a copy's path, which may be broken.

    saw: what clients were told. recovery_s: from the break until all is as before; None where
    nothing was lost. failures: what did not hold.
    """

    folder: Path
    engine: Path
    server: Server
    saw: str = ""
    recovery_s: float | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.server.port

    def want(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> float:
        """How long it took. What never happens is a failure, and the fault's end."""
        return wait_until(condition, what, seconds)

    def recovered(self, since_s: float) -> None:
        """Wait until the server is ready and idle. since_s: of time.monotonic, the break."""
        self.wait(self.server.is_ready, "ready again")
        self.wait(self.server.is_idle, "all blocks are back")
        self.recovery_s = time.monotonic() - since_s


@dataclass(frozen=True)
class Fault:
    """env: of the server. workers: how many. copy: whether the engine is copied, to be broken.

    quick: whether --quick has it; of the others tests/server/launch/test_gunicorn.py has most.
    lacks: what this machine has not, without which it cannot be run. prepare, clean: before the
    server starts, after its end.
    """

    name: str
    run: Callable[[Case], None]
    env: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    copy: bool = False
    quick: bool = True
    lacks: Callable[[], str] = lambda: ""
    prepare: Callable[[Path, dict[str, str]], None] = lambda folder, env: None
    clean: Callable[[Path], None] = lambda folder: None


def run_case(fault: Fault, case: Case) -> None:
    """The fault, from a server that is ready; whatever is raised is what did not hold."""
    try:
        case.wait(case.server.is_ready, "ready")
        fault.run(case)
    except NeverHappened as error:
        case.failures.append(str(error))
    except Exception as error:  # of the fault itself: the others go on
        traceback.print_exc()
        case.failures.append(f"{type(error).__name__}: {error}")

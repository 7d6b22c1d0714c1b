"""One engine's ranks, which mpirun or srun started: ended as the server ends, begun anew together.

    a signal        goes to gunicorn's master, which lets its answers end; to a launcher it would
                    be the end of all ranks at once (Open MPI) or of the workers first (SLURM)
    a rank is lost  the launcher ends the others; what served before is started again

The master says that it serves by writing its process id into a file, on this machine. Knows no
engine and no HTTP.
Source: Open MPI, mpirun(1), "Signal Propagation"; SLURM, srun(1), "SIGNALS AND ESCAPE SEQUENCES".
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.parent import end_with_parent

_LOG = logging.getLogger("enginehouse.launch")
SERVES_FILE = "ENGINEHOUSE_SERVES_FILE"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED_ON = (*_ENDING, signal.SIGHUP, signal.SIGUSR1)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SOUND_S = 600.0  # whoever ran so long starts again after the first pause


def say_that_it_serves(env: Mapping[str, str]) -> None:
    """Called by gunicorn's master once its engine takes requests, under a launcher or not."""
    if not env.get(SERVES_FILE):
        return
    path = Path(env[SERVES_FILE])
    unfinished = path.with_suffix(".new")
    try:
        unfinished.write_text(str(os.getpid()))
        unfinished.replace(path)
    except OSError as error:  # the launcher runs on another machine
        _LOG.warning(
            "%s cannot be written (%s): SIGTERM of the launcher ends all ranks at once; start it "
            "on the machine of rank 0",
            *(path, error.strerror),
        )


class RankGroup:
    """command: a launcher's, which ends when all ranks have, and ends all when one is lost."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command, self._env = command, env
        self._folder = tempfile.TemporaryDirectory(prefix="enginehouse-ranks-")
        self._serves = Path(self._folder.name) / "serves"
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def run(self) -> int:
        """The exit status once it was told to end, or when it has not served at all.

        Raises EnginehouseError when the launcher cannot be run.
        """
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        pause_s = _FIRST_PAUSE_S
        with self._folder:
            while True:
                began_s = time.monotonic()
                status = self._run_once()
                served = self._serves.exists()
                self._serves.unlink(missing_ok=True)
                if self._ended.is_set() or not served:
                    return status
                if time.monotonic() - began_s > _SOUND_S:
                    pause_s = _FIRST_PAUSE_S
                words = "a rank was lost (status %d): all of them are started again in %g s"
                _LOG.error(words, status, pause_s)
                if self._ended.wait(pause_s):
                    return status
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _run_once(self) -> int:
        try:
            self._process = subprocess.Popen(
                self._command,
                env={**self._env, SERVES_FILE: str(self._serves)},
                start_new_session=True,  # a terminal's ctrl-C is ours alone
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise EnginehouseError(f"{self._command[0]}: {error.strerror}") from None
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            self._ended.set()
        try:
            os.kill(int(self._serves.read_text()), number)
        except (OSError, ValueError):  # nothing serves yet, or not on this machine
            if number in _ENDING and self._process is not None:
                self._process.terminate()

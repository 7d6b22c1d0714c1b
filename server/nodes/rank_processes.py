"""The ranks of a worker's node: started, brought back to their leader, and ended together.

    the leader is lost, or not there yet   the rank comes back to it, after a pause
    a rank is killed                       the same: its engine ends, and is started again
    a rank refuses                         trying again would not help: all of them end

Knows no engine, and of a rank only what its exit status means (`runtime/tensorrt/rank.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.parent import end_with_parent
from enginehouse.server.nodes.tensorrt_ranks import RankCommand

_LOG = logging.getLogger("enginehouse.launch")
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_COMES_BACK = (0, os.EX_TEMPFAIL)  # its leader has ended; its leader is lost
_LOOK_AGAIN_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SOUND_S = 600.0  # whoever ran so long starts again after the first pause
_END_S = 30.0


class _Rank:
    """One rank's process, again and again."""

    def __init__(self, start: RankCommand, env: Mapping[str, str]) -> None:
        self.number = start.rank
        self.process: subprocess.Popen[bytes] | None = None
        self._command = start.command
        self._env = {**env, "CUDA_VISIBLE_DEVICES": start.gpu}
        self._pause_s = _FIRST_PAUSE_S
        self._began_s = self._due_s = 0.0

    def look(self) -> None:
        """Start it where it is due. Raises EnginehouseError when it will not come back."""
        now_s = time.monotonic()
        if self.process is None:
            if now_s >= self._due_s:
                self._start(now_s)
            return
        status = self.process.poll()
        if status is None:
            return
        self.process = None
        if status > 0 and status not in _COMES_BACK:
            raise EnginehouseError(
                f"rank {self.number} has refused (exit status {status}), and starting it again "
                "would not help; its own words are in the log above"
            )
        if now_s - self._began_s > _SOUND_S:
            self._pause_s = _FIRST_PAUSE_S
        words = "rank %d has ended (status %d): it comes back to its leader in %g s"
        _LOG.warning(words, self.number, status, self._pause_s)
        self._due_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _start(self, now_s: float) -> None:
        self._began_s = now_s
        try:
            self.process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's ctrl-C is ours alone
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise EnginehouseError(f"{self._command[0]}: {error.strerror}") from None


class RankProcesses:
    """ready_file: there as long as every rank's process runs, for whoever asks whether they do."""

    def __init__(
        self,
        ranks: Sequence[RankCommand],
        env: Mapping[str, str],
        ready_file: Path | None = None,
    ) -> None:
        self._ranks = [_Rank(each, env) for each in ranks]
        self._ready_file = ready_file
        self._is_ready: bool | None = None  # as it was said last
        self._told: int | None = None

    def run(self) -> int:
        """0 once a signal has ended it, which every rank is sent.

        Raises EnginehouseError when a rank refuses or cannot be run; none is left running.
        """
        for number in _ENDING:
            signal.signal(number, self._hear)
        self._say(False)
        try:
            while self._told is None:
                for rank in self._ranks:
                    rank.look()
                self._say(all(rank.process for rank in self._ranks))
                time.sleep(_LOOK_AGAIN_S)
        finally:
            self._say(False)
            self._end(self._told or signal.SIGTERM)
        return 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = number

    def _say(self, is_ready: bool) -> None:
        if self._ready_file is None or is_ready == self._is_ready:
            return
        self._is_ready = is_ready
        try:
            if is_ready:
                self._ready_file.touch()
            else:
                self._ready_file.unlink(missing_ok=True)
        except OSError as error:
            raise EnginehouseError(
                f"{self._ready_file}, which says that the ranks run, cannot be written "
                f"({error.strerror}); give another --ready-file"
            ) from None

    def _end(self, number: int) -> None:
        running = [rank.process for rank in self._ranks if rank.process is not None]
        for process in running:
            process.send_signal(number)
        deadline_s = time.monotonic() + _END_S
        for process in running:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

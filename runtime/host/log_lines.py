"""Log lines of every process of a server: one form, one level, and whoever writes never waits.

A standard error that nobody reads (a stopped terminal, a full pipe) would else hold up all requests
of a worker, or the engine. Knows nothing of what is logged.
"""

from __future__ import annotations

import logging
import os

from gevent.monkey import get_original

LEVELS = ("debug", "info", "warning", "error")
TRAFFIC = "enginehouse.traffic"  # a line for each request, and of throughput

_FORM = "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S %z"  # gunicorn's
_MOST_WAITING = 1000
_FLUSH_S = 1.0
# A worker's are gevent's, and a thread of those would write on the event loop.
_start_thread = get_original("_thread", "start_new_thread")
_new_lock = get_original("_thread", "allocate_lock")
_NativeQueue = get_original("queue", "SimpleQueue")


class LineHandler(logging.Handler):
    """Hands lines to a native thread, which writes them. Of more than _MOST_WAITING that nobody
    reads, the newest are dropped, and counted in the next line that is not.
    """

    def __init__(self, file_descriptor: int) -> None:
        super().__init__()
        self._file_descriptor = file_descriptor
        self._queue = _NativeQueue()
        self._started = False
        self._num_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._queue.qsize() >= _MOST_WAITING:
            self._num_dropped += 1
            return
        line = self.format(record)
        if self._num_dropped:
            line = f"({self._num_dropped} lines before this one could not be written)\n{line}"
            self._num_dropped = 0
        if not self._started:
            self._started = True
            _start_thread(self._write, ())
        self._queue.put(f"{line}\n".encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Wait for what was handed over, at most _FLUSH_S; logging asks for it at the end."""
        if self._started:
            written = _new_lock()
            written.acquire()
            self._queue.put(written)
            written.acquire(timeout=_FLUSH_S)

    def _write(self) -> None:
        while True:
            item = self._queue.get()
            if not isinstance(item, bytes):
                item.release()
                continue
            try:
                while item:
                    item = item[os.write(self._file_descriptor, item) :]
            except OSError:
                pass  # nobody is there to read it


def log_to_stderr(level: str, traffic: bool) -> None:
    """Set this process's log up, in place of what it inherited. level: one of LEVELS, and a
    library's is a warning at least. traffic: whether lines of requests are written. Lines go where
    standard error goes now, whoever listens to that later.
    """
    logging.basicConfig(
        level=max(logging.WARNING, getattr(logging, level.upper())),
        format=_FORM,
        datefmt=_DATE,
        handlers=[LineHandler(os.dup(2))],
        force=True,
    )
    logging.getLogger("enginehouse").setLevel(level.upper())
    logging.getLogger(TRAFFIC).setLevel(logging.INFO if traffic else logging.CRITICAL)

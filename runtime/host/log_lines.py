"""Log lines of every process of a server: one form, one level, and whoever writes never waits.

A standard error that nobody reads (a stopped terminal, a full pipe) would else hold up all requests
of a worker, or the engine. Knows nothing of what is logged.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType
from typing import Any

from gevent.monkey import get_original

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
TRAFFIC = "enginehouse.traffic"  # a line for each request, and of throughput

_FORM = "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S %z"  # gunicorn's
_MOST_WAITING = 1000
_FLUSH_S = 1.0
# A worker's are gevent's, and a thread of those would write on the event loop.
_start_thread = get_original("_thread", "start_new_thread")
_new_lock = get_original("_thread", "allocate_lock")
_NativeQueue = get_original("queue", "SimpleQueue")


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if num_dropped := getattr(record, "lines_dropped", 0):
            return f"({num_dropped} lines before this one could not be written)\n{line}"
        return line


class LineHandler(logging.Handler):
    """Hands lines to a native thread, which writes them. Of more than _MOST_WAITING that nobody
    reads, the newest are dropped, and counted in the next line that is not.
    """

    def __init__(self, file_descriptor: int) -> None:
        super().__init__()
        self._file_descriptor = file_descriptor
        self._queue = _NativeQueue()
        self._writes_in: int | None = None  # the process whose thread writes; a fork's has none
        self._num_dropped = 0
        self.setFormatter(TextFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        if self._writes_in != os.getpid():
            self._writes_in, self._queue = os.getpid(), _NativeQueue()
            _start_thread(self._write, (self._queue,))
        if self._queue.qsize() >= _MOST_WAITING:
            self._num_dropped += 1
            return
        if self._num_dropped:
            record.lines_dropped, self._num_dropped = self._num_dropped, 0
        line = self.format(record)
        self._queue.put(f"{line}\n".encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Wait for what was handed over, at most _FLUSH_S; logging asks for it at the end."""
        if self._writes_in == os.getpid():
            written = _new_lock()
            written.acquire()
            self._queue.put(written)
            written.acquire(timeout=_FLUSH_S)

    def _write(self, queue: Any) -> None:
        while True:
            item = queue.get()
            if not isinstance(item, bytes):
                item.release()
                continue
            try:
                while item:
                    item = item[os.write(self._file_descriptor, item) :]
            except OSError:
                pass  # nobody is there to read it


def log_to_stderr(level: str, traffic: bool, form: str = "text") -> None:
    """Set this process's log up, in place of what it inherited. level: one of LEVELS, and a
    library's is a warning at least. traffic: whether lines of requests are written. form: one of
    FORMATS; json has warnings and what ends the process in it too. Lines go where standard error
    goes now, whoever listens to that later.
    """
    handler = LineHandler(os.dup(2))
    handler.setFormatter(TextFormatter(_FORM, _DATE))
    if form == "json":
        from enginehouse.runtime.host.json_lines import json_formatter

        handler.setFormatter(json_formatter())
        logging.captureWarnings(True)
        sys.excepthook = _log_the_end
        threading.excepthook = _log_a_thread_s_end
    least = max(logging.WARNING, getattr(logging, level.upper()))
    logging.basicConfig(level=least, handlers=[handler], force=True)
    logging.getLogger("enginehouse").setLevel(level.upper())
    logging.getLogger(TRAFFIC).setLevel(logging.INFO if traffic else logging.CRITICAL)


def last_words(program: str, sentence: str, form: str) -> None:
    """Why a process ends: its own line on standard error, or of its log."""
    if form == "json":
        logging.getLogger("enginehouse").critical(sentence)
    else:
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)


def _log_the_end(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    what = (kind, error, traceback)
    logging.getLogger("enginehouse").critical("this process ends by an error", exc_info=what)


def _log_a_thread_s_end(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None:
        what = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        logging.getLogger("enginehouse").error("a thread ended by an error", exc_info=what)

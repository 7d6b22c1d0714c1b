"""The files in which a worker counts, with their room taken before anything is counted.

prometheus_client maps sparse files: on a disk that is full, the first count of a page would end the
worker (SIGBUS), and each that is started in its place. Knows no metric. Source: prometheus_client's
multiprocess mode, whose files are KIND_PID.db.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

_LOG = logging.getLogger("enginehouse.launch")
_KINDS = ("counter", "histogram")  # of server/http/metrics.py's metrics
_BYTES = 128 * 1024  # several times what all of their labels take


def take_room(folder: Path) -> None:
    """Of this process, in the folder that all workers share.

    Where there is none left, this process counts for itself alone, and says so.
    """
    paths = [folder / f"{kind}_{os.getpid()}.db" for kind in _KINDS]
    try:
        for path in paths:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, _BYTES)
    except OSError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        _count_alone()
        _LOG.error(
            "%s has no room for the metrics of this worker (%s): /metrics goes without what it "
            "counts; make room, and send SIGHUP",
            folder,
            error.strerror,
        )


def _count_alone() -> None:
    from prometheus_client import values

    values.ValueClass = values.MutexValue  # what metrics that are made from now on hold

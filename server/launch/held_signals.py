"""What ends a worker, kept until it can be ended: no signal is lost while it starts.

A worker is forked with its master's handlers, which would take SIGTERM for the master's own and
forget it; the master sends it once, and would wait for the worker's end for `graceful_timeout`.
Source: pthread_sigmask(3); pending signals are kept, and none is handed to a child by fork(2).
"""

from __future__ import annotations

import os
import signal

_ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


def hold() -> None:
    """Before a worker is forked, in the master."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


def release() -> None:
    """Once the worker has handlers of its own; and in the master, once it has forked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)


os.register_at_fork(after_in_parent=release)

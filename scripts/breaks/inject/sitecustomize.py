"""Read by Python in every process of a server that is to be broken, before anything else.

BREAK_CLOCK: a file of the seconds that time.time() is wrong by. BREAK_COUNTS: a folder for each
worker's number of greenlets. In the engine host SIGUSR1 holds its loop up for good, as a kernel
that hangs does, and SIGUSR2 takes memory until there is none.
"""

import _thread
import gc
import os
import signal
import sys
import time

sleep = time.sleep  # before gevent has one of its own


def wedge(number, frame):
    while True:
        time.sleep(1)


def leak(number, frame):
    kept = []
    while True:
        kept.append(bytearray(16 << 20))
        time.sleep(0.02)


def count_greenlets():
    """Every few seconds, by a native thread: those of the process that runs it."""
    kept = os.path.join(os.environ["BREAK_COUNTS"], str(os.getpid()))
    while True:
        sleep(4)
        kind = getattr(sys.modules.get("greenlet"), "greenlet", None)
        found = kind and sum(isinstance(each, kind) for each in gc.get_objects())
        with open(f"{kept}.new", "w") as file:
            file.write(str(found or 0))
        os.replace(f"{kept}.new", kept)


if clock := os.environ.get("BREAK_CLOCK"):
    right = time.time

    def wrong():
        with open(clock) as file:
            return right() + float(file.read() or 0)

    time.time = wrong

if "BREAK_COUNTS" in os.environ and "gunicorn" in " ".join(sys.orig_argv):
    start = _thread.start_new_thread  # gevent's would run on the event loop
    os.register_at_fork(after_in_child=lambda: start(count_greenlets, ()))

if "enginehouse-host" in " ".join(sys.orig_argv):
    signal.signal(signal.SIGUSR1, wedge)
    signal.signal(signal.SIGUSR2, leak)

"""Read by Python in every process of a server that is to be broken, before anything else.

BREAK_CLOCK: a file of the seconds that time.time() is wrong by. In the engine host SIGUSR1 holds
its loop up for good, as a kernel that hangs does, and SIGUSR2 takes memory until there is none.
"""

import os
import signal
import sys
import time


def wedge(number, frame):
    while True:
        time.sleep(1)


def leak(number, frame):
    kept = []
    while True:
        kept.append(bytearray(16 << 20))
        time.sleep(0.02)


if clock := os.environ.get("BREAK_CLOCK"):
    right = time.time

    def wrong():
        with open(clock) as file:
            return right() + float(file.read() or 0)

    time.time = wrong

if "enginehouse-host" in " ".join(sys.orig_argv):
    signal.signal(signal.SIGUSR1, wedge)
    signal.signal(signal.SIGUSR2, leak)

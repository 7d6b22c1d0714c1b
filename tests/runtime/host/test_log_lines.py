"""Log lines that nobody reads hold nobody up."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading

from enginehouse.runtime.host.log_lines import LineHandler

# In a process as gunicorn's workers are: gevent's threads would write on the event loop.
WORKER = """
import gevent.monkey
gevent.monkey.patch_all()
import logging, os, gevent
from enginehouse.runtime.host.log_lines import LineHandler
reader, writer = os.pipe()
log = logging.getLogger("x")
log.addHandler(LineHandler(writer))
for _ in range(100):
    log.error("x" * 4096)
    gevent.sleep(0.001)
print("the loop went on", flush=True)
os._exit(0)
"""

PRINTED = """
import logging
from enginehouse.runtime.host.log_lines import TRAFFIC, log_to_stderr
log_to_stderr({level!r}, {traffic})
for name in ("enginehouse.host", TRAFFIC, "library"):
    logging.getLogger(name).info("info of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


def test_a_pipe_that_nobody_reads_does_not_stop_gevents_loop() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "the loop went on\n"


def test_lines_that_were_dropped_are_counted_and_those_kept_are_whole() -> None:
    reader, writer = os.pipe()
    log = logging.Logger("x")
    handler = LineHandler(writer)
    log.addHandler(handler)
    for number in range(1500):
        log.info("%0200d", number)
    lines: list[str] = []
    with open(reader, encoding="utf-8") as file:
        reading = threading.Thread(target=lambda: lines.extend(file))
        reading.start()
        handler.flush()
        log.info("the last")
        handler.flush()
        os.close(writer)
        reading.join()
    numbers = [int(line) for line in lines if re.fullmatch("[0-9]{200}\n", line)]
    assert numbers == sorted(numbers)
    dropped = [int(line[1:].split()[0]) for line in lines if line.startswith("(")]
    assert dropped and len(numbers) + sum(dropped) == 1500
    assert len(lines) == len(numbers) + len(dropped) + 1 and lines[-1] == "the last\n"


def printed(level: str, traffic: bool) -> list[str]:
    code = PRINTED.format(level=level, traffic=traffic)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stderr.splitlines()
    assert all(
        line.startswith("[2") and "] [INFO] " in line or "] [WARNING] " in line for line in lines
    )
    return [line.partition(": ")[2] for line in lines]


def test_the_level_is_the_products_and_lines_of_requests_are_asked_for() -> None:
    ours = ["info of enginehouse.host", "warning of enginehouse.host"]
    traffic = ["info of enginehouse.traffic", "warning of enginehouse.traffic"]
    library = ["warning of library"]
    assert printed("info", False) == [*ours, *library]
    assert printed("warning", True) == [ours[1], *traffic, *library]

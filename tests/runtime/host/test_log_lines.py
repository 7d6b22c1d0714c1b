"""Log lines that nobody reads hold nobody up."""

from __future__ import annotations

import json
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


FORKED = """
import logging, os
from enginehouse.runtime.host.log_lines import log_to_stderr
log_to_stderr("info", False)
log = logging.getLogger("enginehouse.x")
log.info("of the parent")
child = os.fork()
log.info("of the child" if child == 0 else "of the parent again")
if child:
    os.waitpid(child, 0)
"""


JSON = """
import logging, threading, warnings
from enginehouse.runtime.host.log_lines import last_words, log_to_stderr
log_to_stderr("info", False, "json")
log = logging.getLogger("enginehouse.x")
log.info("%d \\u00e9\\n", 1, extra={"request_id": "abc", "seconds": 0.5, "odd": {1, 1}})
log.info("words", extra={"event": "name"})
warnings.warn("look out")
thread = threading.Thread(target=lambda: {}["a thread's"])
thread.start()
thread.join()
last_words("program", "a sentence", "json")
raise ValueError("the end")
"""


def test_json_has_an_object_on_every_line_whatever_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", JSON], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.isascii()
    first, named, warning, thread, words, end = map(json.loads, done.stderr.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first.pop("process") > 0
    assert first == {
        "level": "info",
        "logger": "enginehouse.x",
        "event": "1 \u00e9\n",
        "request_id": "abc",
        "seconds": 0.5,
        "odd": "{1}",
    }
    assert named["event"] == "name"
    assert warning["logger"] == "py.warnings" and "look out" in warning["event"]
    assert thread["level"] == "error" and "a thread's" in thread["exception"]
    assert (words["level"], words["event"]) == ("critical", "a sentence")
    assert end["level"] == "critical" and "ValueError: the end" in end["exception"]


def test_a_process_that_was_forked_writes_its_own_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=True
    )
    told = sorted(line.partition(": ")[2] for line in done.stderr.splitlines())
    assert told == ["of the child", "of the parent", "of the parent again"]


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

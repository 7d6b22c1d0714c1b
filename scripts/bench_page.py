"""What the page's view of the engine costs a server: `python scripts/bench_page.py`.

A scripted server answers streams, one after the other, while nobody looks at its engine and while
eight do, in turns (A B B A). Printed are the medians of what a stream takes of the server's CPU
time, and what one of the eight adds; then what an answer's entry among the lanes takes, which is
what is paid while nobody looks.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scripted.process import MODEL, scripted_server  # noqa: E402

from enginehouse.server.observe.lanes import Lanes  # noqa: E402

TOKENS, WATCHERS = 200, 8
TEXT = "steam " * TOKENS


def ask(address: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}
    request = Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


@contextmanager
def watched(address: str) -> Iterator[list[bytes]]:
    """While the block runs, somebody looks; yields what was seen."""
    seen: list[bytes] = []
    connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", "/v1/engine/events")
    sock = connection.sock
    response = connection.getresponse()

    def look() -> None:
        try:
            seen.extend(response)
        except (OSError, IncompleteRead):
            return  # it was shut from the other thread

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        sock.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        sock.close()


def cpu_s_of(address: str, process: psutil.Process, seconds: float) -> float:
    """Of the server, for a stream, over so many seconds of them."""
    before, count, until = sum(process.cpu_times()[:2]), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        ask(address)
        count += 1
    return (sum(process.cpu_times()[:2]) - before) / count


def entry_s() -> float:
    """What an answer's beginning and end among the lanes take."""
    lanes, completion = Lanes(), object()

    def both() -> None:
        lanes.begin(completion, None, "")  # type: ignore[arg-type]
        lanes.end(completion)  # type: ignore[arg-type]

    return min(timeit.repeat(both, number=100_000, repeat=5)) / 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="of two turns each (default 6)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (default 2)")
    options = parser.parse_args()
    figures: dict[bool, list[float]] = {False: [], True: []}
    with scripted_server([TEXT]) as address:
        [process] = psutil.Process().children()
        cpu_s_of(address, process, options.seconds)
        for index in range(options.rounds):
            for looks in (False, True) if index % 2 == 0 else (True, False):
                figures[looks].append(turn(address, process, options.seconds, looks))
    alone, looked = median(figures[False]), median(figures[True])
    print(f"a stream of {TOKENS} tokens: {alone * 1000:.2f} ms of CPU time, nobody looks")
    added = (looked / alone - 1) / WATCHERS * 100
    print(f"{looked * 1000:.2f} ms while {WATCHERS} look: {added:+.2f} % for each")
    entry = entry_s()
    print(f"its entry among the lanes: {entry * 1e6:.2f} us, {entry / alone * 100:.4f} %")


def turn(address: str, process: Any, seconds: float, looks: bool) -> float:
    if not looks:
        return cpu_s_of(address, process, seconds)
    with ExitStack() as stack:
        seen = [stack.enter_context(watched(address)) for _ in range(WATCHERS)]
        cpu_s = cpu_s_of(address, process, seconds)
    assert all(any(b"engine.look" in line for line in lines) for lines in seen), "not all have seen"
    return cpu_s


if __name__ == "__main__":
    main()

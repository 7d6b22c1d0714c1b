"""The bench of the HTTP layer and of latency: what its load counts, and its engine that answers."""

from __future__ import annotations

import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from enginehouse.server.client.stream_reader import BrokenStream, Stream
from makers.gunicorn_server import free_port, wait_until
from makers.paths import ROOT
from makers.text_engine import engine_info

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    folders = [str(SCRIPTS), str(SCRIPTS / "benches")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def bench(name: str) -> ModuleType:
    return import_module(name)


@pytest.fixture
def trivial() -> Iterator[int]:
    port = free_port()
    command = [sys.executable, str(SCRIPTS / "benches" / "run_trivial.py"), str(port)]
    process = subprocess.Popen(command)
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "listening")
    yield port
    process.kill()
    process.wait()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_load_counts_answers_and_their_events(trivial: int) -> None:
    loader = bench("benches.run_http_load").Loader(trivial, "m")
    plain = loader.plain(connections=2, seconds=0.2, tokens=16)
    assert plain["count"] > 0 and plain["per_s"] == plain["count"] / 0.2
    told = loader.stream(connections=2, seconds=0.2, tokens=16)
    assert told["streams"] > 0 and told["count"] == 18 * told["streams"], "[DONE] is one"
    [seconds] = loader.probe(count=1, tokens=4)["seconds"]
    assert seconds > 0
    with pytest.raises(Exception, match="was to stay open has ended"):
        loader.open(streams=1)
        loader.watch(seconds=60.0)


def test_events_are_counted_however_they_are_cut() -> None:
    run = bench("benches.run_http_load")
    near, far = socket.socketpair()
    with near, far:
        wire = object.__new__(run.Wire)
        wire.socket, wire.num_events, wire.second_s, wire._seen = near, 0, None, b""
        data = bench("benches.run_trivial").STREAM
        ended = []
        for byte in range(0, len(data), 3):
            far.sendall(data[byte : byte + 3])
            if byte < 15:  # the status line comes whole
                continue
            ended.append(wire.read_stream())
    assert wire.num_events == 18 and ended.index(True) == len(ended) - 1


def test_the_engine_that_answers_at_once_gives_each_token_once() -> None:
    at_once = bench("benches.at_once")
    from enginehouse.runtime.request import SamplingParams

    engine = at_once.AtOnce(engine_info(), [7, 8, 9], period_s=0.01)
    quick = engine.submit([1], [SamplingParams(max_tokens=4)])
    slow = engine.submit([1], [SamplingParams(max_tokens=at_once.LONG)])
    outputs = [quick.get(60) for _ in range(4)]
    assert [output.token_ids for _, output in outputs] == [[7], [8], [9], [7]]
    assert quick.finished and quick.get(60) is None
    assert [slow.get(60)[1].token_ids for _ in range(3)] == [[7], [8], [9]]
    slow.cancel()
    assert slow.finished


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    arrivals = bench("bench_latency").arrivals
    found = arrivals(50.0, 100.0, seed=1)
    assert found == arrivals(50.0, 100.0, seed=1) != arrivals(50.0, 100.0, seed=2)
    assert found == sorted(found) and 0 < found[0] and found[-1] < 100
    gaps = [after - before for before, after in zip(found, found[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    spread = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert spread == pytest.approx(mean**2, rel=0.15), "an exponential's"


def test_what_is_late_counts_as_waiting_and_a_broken_stream_ends_the_run() -> None:
    latency = bench("bench_latency")
    stream = Stream("1", "ab", 3, "length", (0.1, 0.3, 0.4), 0.0)
    row = latency.row_of(0.5, 2.0, 1.5, [(0.05, stream), (0.0, stream)])
    assert (row.answered, row.tokens_per_s) == (2, 4.0)
    assert (row.first_p50, row.first_p99) == pytest.approx((0.1, 0.15))
    assert (row.between_p50, row.between_p99) == pytest.approx((0.1, 0.2))

    def broken(prompt: str) -> Stream:
        raise BrokenStream("it broke")

    with pytest.raises(SystemExit, match="streams failed; the first: it broke"):
        latency.open_loop(broken, lambda: "hi", 0.5, 100.0, Namespace(seconds=0.1, seed=0))

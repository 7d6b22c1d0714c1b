"""`top`: what two scrapes come to, what is drawn of it on any width, and servers that go away."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from doubles.scripted_client import ScriptedClient
from doubles.scripted_http import Page, ScriptedServer, serving
from enginehouse.runtime.request import ExecutorStats
from enginehouse.server.client.connection import Connection, parse_address
from enginehouse.server.http.metrics import Metrics
from enginehouse.server.observe.scrapes import Interval, parse_scrape
from enginehouse.verbs.main import main
from enginehouse.verbs.top import View, Watched, duration, sparkline
from makers.text_engine import engine_info

BARS = "▁▂▃▄▅▆▇█"


class Told:
    """A server's metrics, as its own code tells them, behind a scripted server."""

    def __init__(self, server: ScriptedServer) -> None:
        self.client = ScriptedClient(engine_info())
        self.metrics = Metrics(self.client, started_s=time.time() - 3600)
        self.server = server
        server.pages["/health"] = Page(b'{"status": "ready"}')
        self.tell()

    def tell(self) -> None:
        self.server.pages["/metrics"] = Page(self.metrics.render())

    def watched(self) -> Watched:
        return Watched(Connection(parse_address(self.server.url), lambda: 60.0))


@pytest.fixture
def told() -> Iterator[Told]:
    with serving(lambda body: []) as server:
        yield Told(server)


def text_of(view: View, width: int = 200) -> str:
    return "\n".join(line.plain for line in view.lines(width))


def test_rates_and_counts_are_those_of_the_interval(told: Told) -> None:
    before = ExecutorStats(num_prompt_tokens=1000, num_generated_tokens=500, num_cached_tokens=10)
    told.client.stats = before
    told.metrics.count_error(400, "invalid_body")
    told.tell()
    view, server = View("http://server", 2.0), told.watched()
    first = server.read()
    view.take(first)
    told.client.stats = ExecutorStats(
        num_running=3,
        num_waiting=2,
        num_kv_blocks=10,
        num_free_kv_blocks=4,
        num_prompt_tokens=1090,
        num_generated_tokens=540,
        num_cached_tokens=40,
    )
    told.metrics.count_error(429, "rate_limit_exceeded")
    told.tell()
    second = server.read()
    second = second._replace(scrape=parse_scrape(told.metrics.render().decode(), 2.0))
    view = View("http://server", 2.0)
    view.take(first._replace(scrape=type(first.scrape)(0.0, first.scrape.samples)))
    view.take(second)
    text = text_of(view)
    assert "3 running, 2 waiting" in text and "6 used, 4 free of 10" in text
    assert "tokens/s in   60.0" in text, "(90 computed + 30 found) / 2 s"
    assert "tokens/s out  20.0" in text and "25% of prompt tokens" in text
    assert "1 429 rate_limit_exceeded (+1)" in text and "1 400 invalid_body\n" in text
    assert "scripted, W4A16_AWQ on torch, tp 1, pp 1\nready, up 1 h\n" in text


def test_quantiles_leave_out_what_was_before_the_interval(told: Told) -> None:
    def scrape(at_s: float) -> str:
        return parse_scrape(told.metrics.render().decode(), at_s)

    for _ in range(100):
        told.metrics.observe_gap(2.0)
    before = scrape(0.0)
    for gap in (0.003, 0.004, 0.004, 0.02):
        told.metrics.observe_gap(gap)
    interval = Interval(before, scrape(1.0))
    name = "inter_token_latency_seconds"
    assert interval.quantile(name, 0.5) == pytest.approx(0.0025 + 0.0025 * 2 / 3)
    assert interval.quantile(name, 0.99) == pytest.approx(0.01 + 0.015 * 0.96)
    assert interval.quantile("time_to_first_token_seconds", 0.5) is None
    told.metrics.observe_gap(60.0)
    assert Interval(before, scrape(1.0)).quantile(name, 0.99) == float("inf")


def test_a_counter_that_begins_again_counts_from_nothing(told: Told) -> None:
    told.client.stats = ExecutorStats(num_generated_tokens=1000)
    before = parse_scrape(told.metrics.render().decode(), 0.0)
    told.client.stats = ExecutorStats(num_generated_tokens=30)
    after = parse_scrape(told.metrics.render().decode(), 1.0)
    assert Interval(before, after).rate("engine_generation_tokens_total") == 30


def test_a_server_that_goes_is_told_and_waited_for(told: Told) -> None:
    server, view = told.watched(), View("http://server", 1.0)
    view.take(server.read())
    view.take(server.read())
    view.lose("http://server does not answer (Connection refused); is it running?")
    text = text_of(view)
    assert "does not answer (Connection refused); is it running?; waited for" in text
    assert "3 running, 0 waiting" in text, "what was last known stays"
    told.client.stats = ExecutorStats(num_generated_tokens=10**9)
    told.tell()
    view.take(server.read())
    assert "ready" in text_of(view) and "the first figures come in 1 s" in text_of(view)
    view.take(server.read())
    assert "tokens/s out  0.0" in text_of(view), "what it did meanwhile is of no interval"


def test_a_server_that_takes_nothing_says_why(told: Told) -> None:
    told.server.pages["/health"] = Page(b'{"error": {"message": "it is starting"}}', 503)
    view = View("http://server", 1.0)
    view.take(told.watched().read())
    assert "not ready: HTTP 503: it is starting" in text_of(view)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_page_fits_its_terminal_and_cannot_command_it(width: int, told: Told) -> None:
    server, view = told.watched(), View("http://server/" + "x" * 100, 1.0)
    card = b'{"data": [{"id": "\\u001b[2J\\u0007 \\u6a21"}]}'
    told.server.pages["/v1/models"] = Page(card)
    for _ in range(70):
        view.take(server.read())
        told.metrics.observe_gap(0.01)
        for number in range(9):
            told.metrics.count_error(400 + number, f"code\x1b{number}")
        told.tell()
    lines = view.lines(width, BARS)
    assert len(lines) <= 24
    assert all(line.cell_len <= width for line in lines)
    assert all(each.isprintable() for line in lines for each in line.plain)
    drawn = any(set(BARS) & set(line.plain) for line in lines)
    assert drawn == (width >= 80), "histories are drawn where there is room"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Page(b"<html>hello</html>"), "no metric of an enginehouse server is told there"),
        (Page(b"up 1\n"), "no metric of an enginehouse server is told there"),
        (Page(b'{"error": {"message": "the API key: found none"}}', 401), "HTTP 401: the API key"),
        (Page(b"", 404), "HTTP 404: no reason is given"),
    ],
)
def test_what_is_no_server_of_ours_is_one_sentence(
    page: Page, message: str, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    told.server.pages["/metrics"] = page
    assert main(["top", told.server.url, "--once"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"enginehouse top: {told.server.url}/metrics: {message}")
    assert error.count("\n") == 1


def test_once_prints_a_page_without_a_terminal_and_gives_the_key(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    told.server.pages["/v1/openai/models"] = told.server.pages["/v1/models"]
    words = ["top", told.server.url + "/v1/openai", "--interval", "0.1", "--api-key", "sk-1"]
    assert main([*words, "--once"]) == 0
    text = capsys.readouterr().out
    assert "requests      3 running, 0 waiting\n" in text and "\x1b" not in text
    assert set(told.server.keys) == {"Bearer sk-1"}
    assert main(words) == 2
    assert "standard output is no terminal; give --once" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_a_key_ends_it_and_the_terminal_is_as_it_was(key: str, told: Told) -> None:
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(keyboard)
    command = [sys.executable, "-m", "enginehouse.verbs.main", "top", told.server.url]
    process = subprocess.Popen(
        [*command, "--interval", "0.1"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "PYTHONSAFEPATH": "1"},
        preexec_fn=_own_terminal,
    )
    os.close(terminal)
    drawn = b""
    try:
        for _ in range(6000):
            if b"3 running" in drawn:
                break
            if select.select([keyboard], [], [], 0.01)[0]:
                drawn += os.read(keyboard, 1 << 16)
        os.write(keyboard, key.encode())
        while select.select([keyboard], [], [], 60)[0]:
            try:
                piece = os.read(keyboard, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            drawn += piece
        assert process.wait(60) == 0, drawn
        assert termios.tcgetattr(keyboard) == before
        assert b"\x1b[?1049h" in drawn and drawn.count(b"\x1b[?1049l") == 1
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def _own_terminal() -> None:
    """Ctrl-C is a signal only in the terminal that a process is of."""
    import fcntl

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("seconds", ["0", "nan", "1e9", "x"])
def test_an_interval_has_limits(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", seconds])
    assert f"{seconds} is out of range; wanted 0.1 to 3600 seconds" in capsys.readouterr().err


def test_nobody_at_the_address_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "http://127.0.0.1:9 does not answer (Connection refused)" in capsys.readouterr().err


def test_durations_and_histories_read_well() -> None:
    told = [duration(s) for s in (0.4, 61, 3600, 7620, 100_000)]
    assert told == ["0 s", "1 min 1 s", "1 h", "2 h 7 min", "1 d 3 h"]
    assert sparkline([0, 1, None, 7, float("inf")], 8, BARS) == "   ▁▂ ██"
    assert sparkline([0.0] * 3, 2, BARS) == "▁▁"

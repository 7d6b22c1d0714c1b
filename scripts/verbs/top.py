"""`enginehouse top`: a running server in the terminal, from its /metrics, as it works.

Every interval the server is asked once; rates and quantiles are of the interval before. What the
texts of two moments come to is scrapes.py's; here they are asked for and drawn.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import (
    Connection,
    ServerRefused,
    ServerUnreachable,
    parse_address,
)
from enginehouse.verbs.base import VerbParser

if TYPE_CHECKING:
    from rich.text import Text

    from enginehouse.server.observe.scrapes import Figures, Latency, Scrape

_ANSWER_S = 10.0
_HISTORY = 60  # moments
_COST_S = 60.0  # an answer's cost counts at its end: over less, it jumps
_LABEL, _FIGURES, _LEAST_BARS = 14, 42, 6  # columns
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", " .:-=+*#"
_MOST_ERRORS = 4


def make_parser() -> VerbParser:
    parser = VerbParser(
        "top",
        "[URL] [--interval S] [--once] [flags]",
        "Watch a running enginehouse server: what runs and waits, the KV cache, tokens per second, "
        "times to and between tokens, errors and cost. Rates and quantiles are those of the last "
        "interval. q or Ctrl-C ends it.",
        "enginehouse top http://127.0.0.1:8000",
        "enginehouse top --once --interval 10",
    )
    parser.add_argument("url", nargs="?", metavar="URL", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--interval", type=_seconds, metavar="S", default=2.0, help="seconds (default 2)"
    )
    parser.add_argument(
        "--once", action="store_true", help="print one interval as plain text, and end"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="default: ENGINEHOUSE_API_KEY, else OPENAI_API_KEY, of the environment",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is out of range; wanted 0.1 to 3600 seconds")
    return seconds


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    env = os.environ
    key = args.api_key or env.get("ENGINEHOUSE_API_KEY") or env.get("OPENAI_API_KEY")
    if not args.once and not sys.stdout.isatty():
        raise EnginehouseError("standard output is no terminal; give --once for one page of text")
    server = Watched(Connection(parse_address(args.url), lambda: _ANSWER_S, key))
    view = View(args.url, args.interval)
    view.take(server.read())  # refused in one sentence, where there is nothing to watch
    if args.once:
        time.sleep(args.interval)
        view.take(server.read())
        print("\n".join(line.plain.rstrip() for line in view.lines()))
    else:
        _watch(server, view)
    return 0


def _watch(server: Watched, view: View) -> None:
    """Until q, Ctrl-C or the end of the keyboard's input."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    bars = _BARS if console.encoding.startswith("utf") else _ASCII_BARS

    def page() -> Text:
        width, height = console.size
        return Text("\n").join(view.lines(width, bars)[:height])

    try:
        with (
            _keys() as pressed,
            Live(page(), console=console, screen=True, auto_refresh=False) as live,
        ):
            while not pressed(view.interval_s):
                try:
                    view.take(server.read())
                except EnginehouseError as error:
                    view.lose(str(error))
                live.update(page(), refresh=True)
    except KeyboardInterrupt:
        pass


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Waits so many seconds for a key that ends it; where no keyboard is, just so long."""
    if not sys.stdin.isatty():

        def passed(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield passed
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0]:
                typed = os.read(keyboard, 64)
                if not typed or b"q" in typed.lower():
                    return True
        return False

    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


class Reading(NamedTuple):
    """What a server told at one moment. trouble: why it takes no requests, "" where it does."""

    scrape: Scrape
    model: str
    trouble: str


class Watched:
    """Asks one server. Its model is asked for once, and again after it was away."""

    def __init__(self, connection: Connection) -> None:
        self._api = connection
        self._root = connection.at(connection.address.base.partition("/v1")[0])
        self._model: str | None = None

    def read(self) -> Reading:
        """Raises EnginehouseError: it does not answer, refuses, or is no enginehouse server."""
        from enginehouse.server.observe.scrapes import NoMetrics, parse_scrape

        where = f"{self._root.address}{self._root.address.base}/metrics"
        try:
            text = self._root.fetch("GET", "/metrics").content.decode("utf-8", errors="replace")
            scrape = parse_scrape(text, time.monotonic())
            if self._model is None:
                self._model = self._api.first_model()
            return Reading(scrape, self._model, self._trouble())
        except NoMetrics as error:
            raise EnginehouseError(f"{where}: {error}; wanted a server's address") from None
        except ServerRefused as error:
            raise EnginehouseError(f"{where}: {error}") from None
        except ServerUnreachable:
            self._model = None
            raise

    def _trouble(self) -> str:
        try:
            self._root.fetch("GET", "/health")
        except ServerRefused as error:
            return str(error)
        return ""


class View:
    """What is known of the server so far, and how it is drawn. Knows no connection."""

    def __init__(self, url: str, interval_s: float) -> None:
        self.interval_s = interval_s
        self._url = url
        self._last: Reading | None = None
        self._lost: str | None = None
        self._lost_s = 0.0
        self._history: deque[Figures] = deque(maxlen=_HISTORY)
        self._scrapes: deque[Scrape] = deque(maxlen=_HISTORY + 1)

    def take(self, reading: Reading) -> None:
        from enginehouse.server.observe.scrapes import Interval, figures_of

        if self._lost is not None:  # what happened meanwhile is of no interval
            self._scrapes.clear()
            self._history.clear()
        if self._scrapes and reading.scrape.at_s > self._scrapes[-1].at_s:
            self._history.append(figures_of(Interval(self._scrapes[-1], reading.scrape)))
        self._scrapes.append(reading.scrape)
        self._last, self._lost = reading, None

    def lose(self, why: str) -> None:
        """The server did not answer: its last figures stay, and it is waited for."""
        if self._lost is None:
            self._lost_s = time.monotonic()
        self._lost = why

    def lines(self, width: int = 200, bars: str = "") -> list[Text]:
        """The page, each line of at most `width` columns. bars: from the lowest to the highest of
        a history's; "": none is drawn.
        """
        from rich.text import Text

        lines = [Text(_printable(line)) for line in self._head()]
        lines[0].stylize("bold")
        if self._lost is not None:
            lines[-1].stylize("bold red")
        lines.append(Text())
        for label, text, past in self._rows():
            room = width - _LABEL - _FIGURES - 1
            drawn = _printable(text)
            if past and bars and room >= _LEAST_BARS:
                drawn = f"{drawn:<{_FIGURES}} {sparkline(past, room, bars)}"
            lines.append(Text.assemble((f"{label:<{_LABEL}}", "dim"), drawn))
        if bars:
            lines.append(Text(f"every {self.interval_s:g} s; q or Ctrl-C ends it", style="dim"))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
            line.no_wrap = True
        return lines

    def _head(self) -> list[str]:
        assert self._last is not None
        scrape, model, trouble = self._last
        info = scrape.labels("build_info")
        started_s = scrape.value("start_time_seconds")
        state = f"not ready: {trouble}" if trouble else "ready"
        if self._lost is not None:
            away = duration(time.monotonic() - self._lost_s)
            state = f"{self._lost}; waited for {away}"
        elif started_s is not None:
            state += f", up {duration(time.time() - started_s)}"
        served = [model]
        if info:
            served += ["{quantization} on {backend}".format_map(info)]
            served += [f"{size} {info[size + '_size']}" for size in ("tp", "pp")]
        return [f"enginehouse {info.get('version', '')} at {self._url}", ", ".join(served), state]

    def _rows(self) -> Iterator[tuple[str, str, Sequence[float | None]]]:
        """Label, text, history."""
        if not self._history:
            yield "", f"the first figures come in {self.interval_s:g} s", ()
            return
        past, now = self._history, self._history[-1]
        text = f"{now.num_running:.0f} running, {now.num_waiting:.0f} waiting"
        yield "requests", text, [each.num_running + each.num_waiting for each in past]
        free = now.num_blocks - now.num_held
        text = f"{now.num_held:.0f} used, {free:.0f} free of {now.num_blocks:.0f}"
        yield "KV blocks", text, [each.num_held for each in past]
        text = "no prompt" if now.hit_share is None else f"{now.hit_share:.0%} of prompt tokens"
        yield "prefix hits", text, [each.hit_share for each in past]
        text = f"{now.prompt_tokens_per_s:.1f}"
        yield "tokens/s in", text, [each.prompt_tokens_per_s for each in past]
        text = f"{now.output_tokens_per_s:.1f}"
        yield "tokens/s out", text, [each.output_tokens_per_s for each in past]
        yield "", f"{'p50':>12}{'p99':>12}", ()
        yield "first token", _told(now.first_token), [each.first_token.p50 for each in past]
        yield "inter-token", _told(now.inter_token), [each.inter_token.p50 for each in past]
        yield "in the queue", _told(now.queue), [each.queue.p50 for each in past]
        ended = [f"{count:.0f} {reason}" for (reason,), count in now.ended.items() if count]
        yield "ended", ", ".join(ended) or "none", [sum(each.ended.values()) for each in past]
        yield from self._errors(now)
        yield "cost", self._cost(), ()

    def _errors(self, now: Figures) -> Iterator[tuple[str, str, Sequence[float | None]]]:
        """Since the server's start, and of them in the interval; the most frequent first."""
        totals = self._scrapes[-1].by("request_errors_total", "status", "code")
        ranked = sorted(totals.items(), key=lambda item: (-now.refused.get(item[0], 0), -item[1]))
        history = [sum(each.refused.values()) for each in self._history]
        if not ranked:
            yield "errors", "none", history
        for place, ((status, code), total) in enumerate(ranked[:_MOST_ERRORS]):
            new = now.refused.get((status, code), 0)
            text = f"{total:.0f} {status} {code}" + (f" (+{new:.0f})" if new else "")
            yield "" if place else "errors", text, () if place else history

    def _cost(self) -> str:
        from enginehouse.server.observe.scrapes import Interval

        name, now = "estimated_cost_dollars_total", self._scrapes[-1]
        recent = [each for each in self._scrapes if now.at_s - each.at_s <= _COST_S]
        interval = Interval(recent[0] if len(recent) > 1 else self._scrapes[-2], now)
        hourly, spent = 3600 * interval.rate(name), now.value(name) or 0.0
        over = duration(interval.seconds)
        return f"${hourly:.4f} an hour over the last {over}; ${spent:.4f} in all"


def _told(latency: Latency) -> str:
    return "".join(f"{_moment(seconds):>12}" for seconds in latency)


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "too long"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 7 min, 4 d 3 h."""
    whole = max(0, round(seconds))
    for size, unit, small, small_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"


def sparkline(values: Sequence[float | None], width: int, bars: str) -> str:
    """The newest at the right end, as high as the highest that is shown; None: a gap."""
    shown = list(values)[-width:]
    most = max((v for v in shown if v is not None and math.isfinite(v)), default=0.0) or 1.0
    steps = len(bars) - 1
    drawn = [
        " " if value is None else bars[math.ceil(min(value / most, 1.0) * steps)] for value in shown
    ]
    return "".join(drawn).rjust(width)


def _printable(text: str) -> str:
    """What a server says reaches the terminal without what a terminal would obey."""
    return "".join(each if each.isprintable() else " " for each in text)

"""Load a running server with streaming chat clients; measure it, and check what it sends.

First every prompt is answered alone, one after the other. Then, for each number of clients, all
of them stream at once, each its own prompt, at temperature 0; this is repeated `--rounds` times.
A stream must be well formed (one id, the role first, one finish_reason, the usage, [DONE]) and
its id its own; its text is compared with the one given alone. In bfloat16 a batch may round
differently, so texts may part late: that is reported, as the share of the text that is equal. A
stream with exactly another client's text, a broken stream or a shared id fails the run.

Inter-token time is between two pieces of text: where the server holds a token back (half a
character), it counts with the next one. The prompts are short and return in every round, so
time to the first token (TTFT) is that of a prefix already known to the engine.
Needs the standard library only. Exit status: 0, 1 when a check failed, 2 when it could not run.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_CLIENTS = 32
SUBJECTS = (
    *("a lighthouse", "a steam engine", "a baker", "a river", "a clockmaker", "a fox"),
    *("a violin", "a glacier", "a market", "an old bridge", "a beekeeper", "a sailor"),
    *("a library", "a comet", "a gardener", "a windmill", "a painter", "a desert"),
    *("a postman", "a whale", "a chess player", "a castle", "a doctor", "a volcano"),
    *("a weaver", "a kite", "a farmer", "a submarine", "a forest", "a teacher"),
    *("a coal mine", "an orchestra"),
)
_MAX_LINE_BYTES = 1 << 20


class BenchError(Exception):
    """The run cannot begin or go on; the message says why."""


class BrokenStream(Exception):
    """A stream that is not what the API promises."""


class Target(NamedTuple):
    """Where to send requests, and until when (time.monotonic)."""

    host: str
    port: int
    deadline_s: float

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=self.remaining_s())

    def remaining_s(self) -> float:
        remaining = self.deadline_s - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("--timeout is over")
        return remaining


class Answer(NamedTuple):
    """A plain request's answer; ignored_fields are those the server says it did not know."""

    status: int
    body: bytes
    ignored_fields: str


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer. Times are seconds: of each piece of text since sending, and of the end."""

    id: str
    text: str
    num_tokens: int
    finish_reason: str
    piece_times_s: tuple[float, ...]
    end_s: float  # time.monotonic


class StreamReader:
    """Takes a stream's data lines; raises BrokenStream at the first that does not belong there."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.finish_reason: str | None = None
        self.num_tokens: int | None = None
        self.done = False
        self.texts: list[str] = []
        self._role: str | None = None

    def push(self, data: str) -> str:
        """Take the text behind `data: `; returns the new piece of the answer, or ''."""
        if self.done:
            raise BrokenStream(f"{data[:80]!r} came after [DONE]")
        if data == "[DONE]":
            self.done = True
            return ""
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise BrokenStream(f"error in the stream: {chunk['error'].get('message')}")
            return self._take(chunk)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise BrokenStream(f"{data[:80]!r} is no chat.completion.chunk") from None

    def _take(self, chunk: dict[str, Any]) -> str:
        if chunk["object"] != "chat.completion.chunk":
            raise BrokenStream(f"object is {chunk['object']!r}; wanted chat.completion.chunk")
        if self.id is not None and chunk["id"] != self.id:
            raise BrokenStream(f"two ids in one stream: {self.id} and {chunk['id']}")
        self.id = str(chunk["id"])
        if not chunk["choices"]:
            if self.finish_reason is None:
                raise BrokenStream("usage came before finish_reason")
            self.num_tokens = int(chunk["usage"]["completion_tokens"])
            return ""
        [choice] = chunk["choices"]
        delta, text = choice["delta"], choice["delta"].get("content") or ""
        if self.finish_reason is not None:
            raise BrokenStream("a choice came after its finish_reason")
        if self._role is None:
            if delta.get("role") != "assistant":
                raise BrokenStream(f"the first delta is {delta}; wanted the assistant's role")
            self._role = "assistant"
        elif "role" in delta:
            raise BrokenStream("the role came twice")
        self.finish_reason = choice["finish_reason"]
        self.texts.append(text)
        return str(text)

    def check_end(self) -> None:
        wanted = {"finish_reason": self.finish_reason, "usage": self.num_tokens}
        missing = [name for name, value in wanted.items() if value is None]
        missing += [] if self.done else ["[DONE]"]
        if missing:
            raise BrokenStream(f"the stream ended without {', '.join(missing)}")


class Api:
    """Requests to one server for one model."""

    def __init__(self, target: Target, model: str | None, num_tokens: int) -> None:
        self._target = target
        self._num_tokens = num_tokens
        self.model = model or self._first_model()
        self.ignore_eos = False
        self.ignore_eos = self._accepts_ignore_eos()

    def _first_model(self) -> str:
        try:
            return str(json.loads(self._fetch("GET", "/v1/models").body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise BenchError("GET /v1/models names no model; give --model") from None

    def _accepts_ignore_eos(self) -> bool:
        """Ask once: a server that does not know the field refuses it or reports it as ignored."""
        body = self._body("Say hello.", stream=False) | {"ignore_eos": True}
        answer = self._fetch("POST", "/v1/chat/completions", body)
        return answer.status == 200 and "ignore_eos" not in answer.ignored_fields

    def _fetch(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """A plain request; BenchError unless it is answered, and not refused but for ignore_eos."""
        try:
            with closing(self._target.connect()) as connection:
                connection.request(method, path, **(_json_body(body) if body else {}))
                response = connection.getresponse()
                content = response.read(_MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            where = f"{self._target.host}:{self._target.port}"
            raise BenchError(
                f"{where} does not answer {path} ({error}); is it running? make serve"
            ) from None
        refused = response.status != 200
        if refused and not (response.status == 400 and b"ignore_eos" in content):
            raise BenchError(f"{method} {path}: {_refusal(response.status, content)}")
        return Answer(response.status, content, response.getheader("X-Ignored-Fields", ""))

    def _body(self, prompt: str, stream: bool = True) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._num_tokens,
            "temperature": 0,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | ({"ignore_eos": True} if self.ignore_eos else {})

    def stream(self, prompt: str) -> Stream:
        """Stream one answer. Raises BrokenStream, whatever went wrong."""
        try:
            with closing(self._target.connect()) as connection:
                started_s = time.monotonic()
                connection.request("POST", "/v1/chat/completions", **_json_body(self._body(prompt)))
                response = connection.getresponse()
                if response.status != 200:
                    content = response.read(_MAX_LINE_BYTES)
                    raise BrokenStream(_refusal(response.status, content))
                kind = response.getheader("Content-Type", "")
                if not kind.startswith("text/event-stream"):
                    raise BrokenStream(f"Content-Type is {kind!r}; wanted text/event-stream")
                return self._read(response, started_s)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenStream(f"{type(error).__name__}: {error}") from None

    def _read(self, response: http.client.HTTPResponse, started_s: float) -> Stream:
        reader, times = StreamReader(), []
        while line := response.readline(_MAX_LINE_BYTES):
            self._target.remaining_s()
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if not text or text.startswith(":"):  # the end of an event, or a keep-alive
                continue
            if not text.startswith("data: "):
                raise BrokenStream(f"{text[:80]!r} is no data line")
            if reader.push(text.removeprefix("data: ")):
                times.append(time.monotonic() - started_s)
        reader.check_end()
        assert reader.id and reader.finish_reason and reader.num_tokens is not None
        return Stream(
            id=reader.id,
            text="".join(reader.texts),
            num_tokens=reader.num_tokens,
            finish_reason=reader.finish_reason,
            piece_times_s=tuple(times),
            end_s=time.monotonic(),
        )


def _json_body(body: dict[str, Any]) -> dict[str, Any]:
    return {"body": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}


def _refusal(status: int, body: bytes) -> str:
    return f"HTTP {status}: {body[:300].decode('utf-8', errors='replace')}"


class Round(NamedTuple):
    """Streams of one burst by client (None: it failed), and its seconds from start to last end."""

    streams: list[Stream | None]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(s.num_tokens for s in self.streams if s is not None) / self.wall_s


def run_round(ask: Callable[[str], Stream], prompts: Sequence[str], faults: list[str]) -> Round:
    """All prompts at once, a thread for each; what goes wrong is added to `faults`."""
    streams: list[Stream | None] = [None] * len(prompts)
    start = threading.Barrier(len(prompts) + 1)

    def client(index: int) -> None:
        start.wait()
        try:
            streams[index] = ask(prompts[index])
        except BrokenStream as error:
            faults.append(f"{len(prompts)} clients, client {index}: {error}")

    threads = [
        threading.Thread(target=client, args=(index,), daemon=True) for index in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    start.wait()
    started_s = time.monotonic()
    for thread in threads:
        thread.join()
    ends = [stream.end_s for stream in streams if stream is not None]
    return Round(streams, max(ends, default=time.monotonic()) - started_s)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def common_share(text: str, other: str) -> float:
    """How much of the longer text is a beginning that both have, 0 to 1."""
    longest = max(len(text), len(other))
    return len(os.path.commonprefix([text, other])) / longest if longest else 1.0


@dataclass(frozen=True, slots=True)
class Level:
    """What one number of clients gave over all rounds. Milliseconds; None where nothing came."""

    clients: int
    tokens_per_s: float
    tokens_per_s_of_rounds: list[float]
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    num_tokens: int
    streams: int
    broken: int
    equal: int
    different: int
    common_share_mean: float | None
    common_share_min: float | None


def summarise(rounds: Sequence[Round], alone: Sequence[Stream]) -> Level:
    """alone: the stream of each client's prompt when it was the only one."""
    pairs = [
        (stream, wanted)
        for one in rounds
        for stream, wanted in zip(one.streams, alone, strict=False)
        if stream is not None
    ]
    num_asked = sum(len(one.streams) for one in rounds)
    times = [stream.piece_times_s for stream, _ in pairs]
    firsts = [1000 * pieces[0] for pieces in times if pieces]
    gaps = [1000 * (b - a) for pieces in times for a, b in zip(pieces, pieces[1:], strict=False)]
    shares = [common_share(stream.text, wanted.text) for stream, wanted in pairs]
    equal = sum(stream.text == wanted.text for stream, wanted in pairs)
    rates = [one.tokens_per_s for one in rounds]
    return Level(
        clients=len(rounds[0].streams),
        tokens_per_s=statistics.median(rates),
        tokens_per_s_of_rounds=rates,
        ttft_p50_ms=percentile(firsts, 0.5),
        ttft_p99_ms=percentile(firsts, 0.99),
        inter_token_p50_ms=percentile(gaps, 0.5),
        inter_token_p99_ms=percentile(gaps, 0.99),
        num_tokens=sum(stream.num_tokens for stream, _ in pairs),
        streams=num_asked,
        broken=num_asked - len(pairs),
        equal=equal,
        different=len(pairs) - equal,
        common_share_mean=statistics.fmean(shares) if shares else None,
        common_share_min=min(shares, default=None),
    )


def mix_ups(streams: Sequence[Stream | None], alone: Sequence[Stream], seen: set[str]) -> list[str]:
    """Ids that came twice in the run, and texts that are exactly another client's."""
    found = []
    owner = {stream.text: index for index, stream in enumerate(alone)}
    for index, stream in enumerate(streams):
        if stream is None:
            continue
        if stream.id in seen:
            found.append(f"client {index}: id {stream.id} was another stream's")
        seen.add(stream.id)
        if stream.text != alone[index].text and stream.text in owner:
            found.append(f"client {index} was sent the text of client {owner[stream.text]}")
    return found


def print_table(levels: Sequence[Level]) -> None:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [
        ("clients", "tokens/s", "TTFT p50", "p99 ms", "token p50", "p99 ms", "equal", "prefix %"),
        *(
            (
                str(level.clients),
                f"{level.tokens_per_s:.1f}",
                ms(level.ttft_p50_ms),
                ms(level.ttft_p99_ms),
                ms(level.inter_token_p50_ms),
                ms(level.inter_token_p99_ms),
                f"{level.equal}/{level.streams}",
                "-" if level.common_share_mean is None else f"{100 * level.common_share_mean:.0f}",
            )
            for level in levels
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def make_target(url: str, allow_remote: bool, timeout_s: int) -> Target:
    """Where `url` points. Raises BenchError for anything but http, and for other machines."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme != "http" or not host:
        raise BenchError(f"{url} is no address to load; wanted one like http://127.0.0.1:8000")
    if not allow_remote and not _is_loopback(host):
        raise BenchError(f"{host} is not this machine; give --allow-remote if it is yours to load")
    return Target(host, port, time.monotonic() + timeout_s)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it leads is not known


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--clients", type=_count(MAX_CLIENTS), nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=_count(100_000), default=64, help="max_tokens of each")
    parser.add_argument("--rounds", type=_count(1000), default=3)
    parser.add_argument("--timeout", type=_count(86400), default=300, help="seconds in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--allow-remote", action="store_true", help="load another machine")
    return parser


def _count(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= limit:
            raise argparse.ArgumentTypeError(f"{text} is out of range; wanted 1 to {limit}")
        return int(text)

    return parse


def bench(args: argparse.Namespace, faults: list[str]) -> dict[str, Any]:
    """The figures of the whole run; checks that failed are added to `faults`."""
    api = Api(make_target(args.url, args.allow_remote, args.timeout), args.model, args.tokens)
    eos = "ignored" if api.ignore_eos else "ends an answer early (the API has no ignore_eos)"
    print(f"{args.url}: {api.model}, up to {args.tokens} tokens each; end of sequence {eos}")
    prompts = [f"Write a long story about {subject}." for subject in SUBJECTS[: max(args.clients)]]
    alone: list[Stream] = []
    for prompt in prompts:
        try:
            alone.append(api.stream(prompt))
        except BrokenStream as error:
            raise BenchError(f"alone, {prompt!r}: {error}") from None
    seen: set[str] = set()
    faults += mix_ups(alone, alone, seen)
    levels: list[Level] = []
    for num_clients in args.clients:
        rounds: list[Round] = []
        for _ in range(args.rounds):
            num_faults = len(faults)
            rounds.append(run_round(api.stream, prompts[:num_clients], faults))
            faults += mix_ups(rounds[-1].streams, alone, seen)
            if len(faults) > num_faults:  # the figures of a failing server are of no use
                break
        levels.append(summarise(rounds, alone))
        if faults:
            break
    print_table(levels)
    return {
        "url": args.url,
        "model": api.model,
        "max_tokens": args.tokens,
        "rounds": args.rounds,
        "ignore_eos": api.ignore_eos,
        "levels": [
            {name: getattr(level, name) for name in Level.__dataclass_fields__} for level in levels
        ],
        "faults": faults,
    }


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    faults: list[str] = []
    try:
        figures = bench(args, faults)
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (BenchError, OSError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"FAILED {fault}", file=sys.stderr)
    if not faults:
        print("every stream was well formed, and none had another's id or text")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

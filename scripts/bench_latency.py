"""Latency under load: `python scripts/bench_latency.py ENGINE [flags]`, a server of its own.

First the saturated rate: so many clients, each asking again as soon as it is answered. Then shares
of that rate in an open loop: requests arrive as a Poisson process, seeded, whatever the server does
meanwhile, and the time to the first token counts from the moment a request was due. Between tokens
is between two pieces of a stream's text. The load is enginehouse's own (server/client/), in threads
of this process, which shares the machine with the server; every prompt is new, of 90 tokens with
the template about it. With `--with guidellm` that project's generator sends the same rates after
it, with prompts of as many tokens, new too. With `--batch` each load runs again while a batch does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benches import guidellm, peers  # noqa: E402
from benches.beside_batch import Batches  # noqa: E402
from benches.figures import percentile  # noqa: E402
from benches.goals import markdown  # noqa: E402
from benches.prompts import Prompts  # noqa: E402
from benches.quiet import Others  # noqa: E402

from enginehouse.server.client.connection import parse_address  # noqa: E402
from enginehouse.server.client.load import LoadClient, connect_for_load  # noqa: E402
from enginehouse.server.client.own_server import (  # noqa: E402
    OwnServer,
    free_port,
    serve_command,
)
from enginehouse.server.client.stream_reader import BrokenStream, Stream  # noqa: E402

CACHE = Path(__file__).resolve().parents[1] / ".cache"
OURS = "enginehouse"
PROMPT_TOKENS = 90  # the template's with them: 60 of guidellm's are as many
_START_S, _MOST_S = 300.0, 3600.0
_MOST_OPEN = 256  # requests; beyond them the server does not keep up at all


class Row(NamedTuple):
    """One load. by: the generator; share: of the saturated rate; rate: requests a second, asked.
    Seconds.
    """

    by: str
    share: float
    rate: float
    answered: int
    tokens_per_s: float
    first_p50: float
    first_p99: float
    between_p50: float
    between_p99: float


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--clients", type=int, default=16, help="that saturate it (default 16)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load (default 30)")
    parser.add_argument("--shares", type=int, nargs="+", default=[50, 80, 95], metavar="PERCENT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--with", dest="other", choices=["guidellm"], help="another generator too")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", help="its environment")
    parser.add_argument("--batch", action="store_true", help="each load beside a batch too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    CACHE.mkdir(exist_ok=True)
    python = peers.python_of(peers.GUIDELLM, args.peers) if args.other else None
    port = free_port()
    files = CACHE / "latency_files"
    batches = Batches(files) if args.batch else None
    env = {**os.environ, "ENGINEHOUSE_FILES_DIR": str(files)}
    command = serve_command(str(args.engine), port)
    with OwnServer(command, port, CACHE / "latency.log", env) as server:
        server.wait_ready(_START_S)
        address = parse_address(f"http://127.0.0.1:{port}")
        connection = connect_for_load(address, allow_remote=False, seconds=_MOST_S)
        client = LoadClient(connection, None, args.tokens)
        prompts = Prompts(args.engine, client.model)

        def next_prompt() -> str:
            [made] = prompts.make(1, PROMPT_TOKENS)
            return str(made["text"])

        for _ in range(args.clients):  # the template's own words are known from here on
            client.stream(next_prompt())
        with Others() as others:
            rate = saturated_rate(client.stream, next_prompt, args.clients, args.seconds)
            shares = [share / 100 for share in args.shares]
            rows = [open_loop(client.stream, next_prompt, share, rate, args) for share in shares]
            for share in shares if batches is not None else ():
                assert batches is not None
                with batches.running(client.model, next_prompt, args.tokens):
                    row = open_loop(client.stream, next_prompt, share, rate, args)
                by = f"beside a batch, {batches.num_answered} lines"
                rows.append(row._replace(by=by))
            if python is not None:
                asked = str(address), args.engine.resolve(), client.model
                rows += [by_guidellm(python, asked, share, rate, args) for share in shares]
    print(f"saturated: {rate:.2f} requests/s of {args.tokens} tokens, {args.clients} clients")
    print(f"others took {others.share:.0%} of the machine; {args.seconds:g} s a load\n")
    print(markdown(table(rows)))
    if args.json is not None:
        told = {"rate": rate, "others": others.share, "rows": [row._asdict() for row in rows]}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


def saturated_rate(
    ask: Callable[[str], Stream],
    next_prompt: Callable[[], str],
    num_clients: int,
    seconds: float,
) -> float:
    """Answers a second, in a closed loop; those that the end cuts are not counted."""
    end_s, counts = time.monotonic() + seconds, [0] * num_clients

    def client(number: int) -> None:
        while True:
            ask(next_prompt())
            if time.monotonic() > end_s:
                return
            counts[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process of that rate, in seconds from its beginning."""
    drawn, moment, found = random.Random(seed), 0.0, list[float]()
    while (moment := moment + drawn.expovariate(rate)) < seconds:
        found.append(moment)
    return found


def open_loop(
    ask: Callable[[str], Stream],
    next_prompt: Callable[[], str],
    share: float,
    saturated: float,
    args: argparse.Namespace,
) -> Row:
    rate = share * saturated
    due = arrivals(rate, args.seconds, args.seed)
    if not due:
        raise SystemExit(f"bench_latency: nothing arrives in {args.seconds:g} s; give more")
    began = time.monotonic()
    streams: list[tuple[float, Stream]] = []  # the delay of its beginning, and what came
    faults: list[str] = []

    def one(moment: float, prompt: str) -> None:
        late = time.monotonic() - began - moment
        try:
            streams.append((late, ask(prompt)))
        except BrokenStream as error:
            faults.append(str(error))

    threads: list[threading.Thread] = []
    for moment in due:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        threads = [thread for thread in threads if thread.is_alive()]
        if len(threads) >= _MOST_OPEN:
            raise SystemExit(f"bench_latency: {_MOST_OPEN} requests are open; the server is behind")
        threads.append(threading.Thread(target=one, args=(moment, next_prompt())))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if faults:
        raise SystemExit(f"bench_latency: {len(faults)} streams failed; the first: {faults[0]}")
    wall_s = time.monotonic() - began
    return row_of(share, rate, wall_s, streams)


def row_of(
    share: float, rate: float, wall_s: float, streams: Sequence[tuple[float, Stream]]
) -> Row:
    """Of streams and how much later than they were due each was asked for."""
    first = [late + stream.piece_times_s[0] for late, stream in streams]
    between = [
        after - before
        for _, stream in streams
        for before, after in zip(stream.piece_times_s, stream.piece_times_s[1:], strict=False)
    ]
    return Row(
        OURS,
        share,
        rate,
        len(streams),
        sum(stream.num_tokens for _, stream in streams) / wall_s,
        percentile(first, 0.5),
        percentile(first, 0.99),
        percentile(between, 0.5),
        percentile(between, 0.99),
    )


def by_guidellm(
    python: Path,
    asked: tuple[str, Path, str],
    share: float,
    saturated: float,
    args: argparse.Namespace,
) -> Row:
    """asked: the address, the engine and the model's name."""
    rate = share * saturated
    found = guidellm.measured(python, *asked, rate, args.tokens, args.seconds)
    return Row("guidellm", share, rate, **found)  # type: ignore[arg-type]


def table(rows: Sequence[Row]) -> list[list[str]]:
    head = ["by", "load", "requests/s", "answered", "tokens/s"]
    head += ["first token p50 / p99, ms", "between tokens p50 / p99, ms"]
    return [
        head,
        *(
            [
                row.by,
                f"{row.share:.0%}",
                f"{row.rate:.2f}",
                str(row.answered),
                f"{row.tokens_per_s:.0f}",
                f"{1000 * row.first_p50:.0f} / {1000 * row.first_p99:.0f}",
                f"{1000 * row.between_p50:.0f} / {1000 * row.between_p99:.0f}",
            ]
            for row in rows
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())

"""`enginehouse bench`: load a running server with streaming chat clients; measure and check it.

First every prompt is answered alone, one after the other. Then, for each number of clients, all
of them stream at once, each its own prompt, at temperature 0; this is repeated `--rounds` times.
A stream must be well formed and its id its own; its text is compared with the one given alone,
which a batch in bfloat16 may round differently. A stream with exactly another client's text, a
broken stream or a shared id fails the run. How load is made and measured is server/client/'s.
Exit status: 0, 1 when a check failed, 2 when it could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import parse_address
from enginehouse.server.client.levels import Level, summarise
from enginehouse.server.client.load import (
    MAX_CLIENTS,
    PROMPTS,
    LoadClient,
    Round,
    connect_for_load,
    mix_ups,
    run_round,
)
from enginehouse.server.client.stream_reader import BrokenStream, Stream
from enginehouse.verbs.base import VerbParser, count_up_to


def make_parser() -> VerbParser:
    parser = VerbParser(
        "bench",
        "[URL] [--clients N ...] [--tokens N] [--rounds N] [flags]",
        "Load a running server with streaming clients: tokens per second, time to the first token "
        "and between tokens, and whether every stream is what the API promises. Exit status 1: one "
        "was not.",
        "enginehouse bench http://127.0.0.1:8000 --clients 1 4 16 --tokens 64",
    )
    parser.add_argument("url", nargs="?", metavar="URL", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument(
        "--clients",
        type=count_up_to(MAX_CLIENTS),
        nargs="+",
        metavar="N",
        default=[1, 4, 16],
        help="how many stream at once (default 1 4 16)",
    )
    counts = (
        ("--tokens", 100_000, 64, "max_tokens of each"),
        ("--rounds", 1000, 3, "how often each number of clients is tried"),
        ("--timeout", 86400, 300, "seconds in all"),
    )
    for flag, limit, default, text in counts:
        text = f"{text} (default {default})"
        parser.add_argument(flag, type=count_up_to(limit), metavar="N", default=default, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--allow-remote", action="store_true", help="load another machine, which is yours to load"
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    faults: list[str] = []
    figures = run(args, faults)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for fault in faults:
        print(f"FAILED {fault}", file=sys.stderr)
    if not faults:
        print("every stream was well formed, and none had another's id or text")
    return 1 if faults else 0


def run(args: argparse.Namespace, faults: list[str]) -> dict[str, Any]:
    """The figures of the whole run; checks that failed are added to `faults`."""
    connection = connect_for_load(
        parse_address(args.url), allow_remote=args.allow_remote, seconds=args.timeout
    )
    client = LoadClient(connection, args.model, args.tokens)
    eos = "ignored" if client.ignore_eos else "ends an answer early (the API has no ignore_eos)"
    print(f"{args.url}: {client.model}, up to {args.tokens} tokens each; end of sequence {eos}")
    prompts = PROMPTS[: max(args.clients)]
    alone: list[Stream] = []
    for prompt in prompts:
        try:
            alone.append(client.stream(prompt))
        except BrokenStream as error:
            raise EnginehouseError(f"alone, {prompt!r}: {error}") from None
    seen: set[str] = set()
    faults += mix_ups(alone, alone, seen)
    levels: list[Level] = []
    for num_clients in args.clients:
        rounds: list[Round] = []
        for _ in range(args.rounds):
            num_faults = len(faults)
            rounds.append(run_round(client.stream, prompts[:num_clients], faults))
            faults += mix_ups(rounds[-1].streams, alone, seen)
            if len(faults) > num_faults:  # the figures of a failing server are of no use
                break
        levels.append(summarise(rounds, alone))
        if faults:
            break
    print_table(levels)
    return {
        "url": args.url,
        "model": client.model,
        "max_tokens": args.tokens,
        "rounds": args.rounds,
        "ignore_eos": client.ignore_eos,
        "levels": [asdict(level) for level in levels],
        "faults": faults,
    }


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

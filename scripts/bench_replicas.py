"""Conversations with a server of several replicas, by each way to choose one: docs/replicas.md.

Each client leads one conversation after another, of so many turns: a system prompt that all share,
then questions, each answered and sent again with the next. Measured: how much of the prompts was in
a KV cache, and the time to the first token, of all turns and of those after the first.

    python scripts/bench_replicas.py engines/mine --replicas 2 --clients 4 --turns 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

ROUTINGS = ("prefix", "least_loaded", "round_robin")
WORDS = "river stone ledger harbour copper winter orchard signal engine valley paper market".split()
START_S = 300.0


class Turn(NamedTuple):
    """number: in its conversation, from 0. Tokens and seconds; error: none was answered."""

    number: int
    num_prompt: int = 0
    num_cached: int = 0
    first_s: float = 0.0
    error: str = ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--clients", type=int, default=4, help="conversations at once")
    parser.add_argument("--conversations", type=int, default=3, help="of each client")
    parser.add_argument("--turns", type=int, default=5, help="of each conversation")
    parser.add_argument("--system-words", type=int, default=100)
    parser.add_argument("--question-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--port", type=int, default=8137)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def ask(url: str, messages: list[dict[str, str]], number: int, max_tokens: int) -> tuple[Turn, str]:
    """One turn, and its answer."""
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"model": "bench", "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    began_s, first_s, text, usage = time.monotonic(), None, "", dict[str, Any]()
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise OSError(event["error"]["message"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and first_s is None:
                    first_s = time.monotonic() - began_s
                text += piece
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Turn(number, usage["prompt_tokens"], cached, first_s or 0.0), text


def converse(url: str, args: argparse.Namespace, client: int, turns: list[Turn]) -> None:
    system = words(random.Random(0), args.system_words)
    for conversation in range(args.conversations):
        rng = random.Random(f"{client}-{conversation}")
        messages = [{"role": "system", "content": system}]
        for number in range(args.turns):
            question = words(rng, args.question_words)
            messages.append({"role": "user", "content": question})
            try:
                turn, answer = ask(url, messages, number, args.max_tokens)
            except (OSError, urllib.error.URLError) as error:
                turns.append(Turn(number, error=str(error)))
                break
            turns.append(turn)
            messages.append({"role": "assistant", "content": answer})


def measure(args: argparse.Namespace, routing: str) -> dict[str, float]:
    """A server of its own, asked until every conversation is over."""
    url = f"http://127.0.0.1:{args.port}"
    command = [sys.executable, "-m", "enginehouse.verbs.main", "serve", str(args.engine)]
    command += ["--port", str(args.port), "--replicas", str(args.replicas), "--name", "bench"]
    env = {**os.environ, "ENGINEHOUSE_ROUTING": routing}
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    turns: list[Turn] = []
    try:
        wait_ready(url, args.replicas, server)
        clients = [
            threading.Thread(target=converse, args=(url, args, number, turns))
            for number in range(args.clients)
        ]
        began_s = time.monotonic()
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.monotonic() - began_s
    finally:
        server.terminate()
        server.wait(60)
    told = [turn for turn in turns if not turn.error]
    later = [turn.first_s for turn in told if turn.number]
    first = sorted(turn.first_s for turn in told)
    return {
        "hit_rate": sum(t.num_cached for t in told) / max(1, sum(t.num_prompt for t in told)),
        "ttft_p50_s": statistics.median(first),
        "ttft_p95_s": first[int(0.95 * (len(first) - 1))],
        "ttft_later_p50_s": statistics.median(later) if later else 0.0,
        "turns_per_s": len(told) / seconds,
        "turns": len(told),
        "errors": len(turns) - len(told),
    }


def wait_ready(url: str, num_replicas: int, server: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
                text = response.read().decode()
            if len(re.findall(r"^enginehouse_ready(?:\{.*\})? 1.0$", text, re.M)) == num_replicas:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready in {START_S:g} s")


def main() -> int:
    args = make_parser().parse_args()
    found = {routing: measure(args, routing) for routing in args.routing}
    names = list(next(iter(found.values())))
    print("| routing | " + " | ".join(names) + " |")
    print("| --- " * (len(names) + 1) + "|")
    for routing, row in found.items():
        print(f"| {routing} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

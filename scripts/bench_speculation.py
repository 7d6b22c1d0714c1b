"""What drafts by prompt lookup bring, and what they cost where they bring nothing: docs/cpu.md.

    python scripts/bench_speculation.py ENGINE [--rounds 9] [--tokens 128]

Two executors of one engine, with drafts and without, answer the same prompts in turn: one sequence
after the other, and four beside each other. Greedy, and drawn at a temperature of 0.8 with a seed.
Told is the ratio of their times, medians of the rounds, and how many of the drafted
tokens were right; that the answers are the same is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benches.tasks import TASKS

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.server.prompt.chat import load_chat
from enginehouse.server.text.message import ChatMessage

_LONGEST = 1 << 20
_BESIDE = 4
TEMPERATURES = {"greedy": 0.0, "drawn": 0.8}


def timed(executor: Executor, group: list[Request]) -> tuple[float, dict[int, list[int]]]:
    """Seconds, and what was answered."""
    began_s = time.perf_counter()
    answers = generate(executor, group)
    return time.perf_counter() - began_s, answers


def compare(
    plain: Executor, drafting: Executor, work: list[list[Request]], rounds: int
) -> tuple[float, int, int]:
    """How many times as fast drafts make it; tokens drafted in a round, and how many were right."""
    before = drafting.stats()
    seconds: dict[Executor, list[list[float]]] = {plain: [], drafting: []}
    for group in work:
        for times in seconds.values():
            times.append([])
        for turn in range(rounds + 1):
            pair = (plain, drafting) if turn % 2 else (drafting, plain)
            found = {executor: timed(executor, group) for executor in pair}
            assert found[plain][1] == found[drafting][1], "drafts changed an answer"
            for executor, (taken, _) in found.items():
                if turn:  # the first fills the cache of prefixes
                    seconds[executor][-1].append(taken)
    after = drafting.stats()
    drafted = (after.num_draft_tokens - before.num_draft_tokens) // (rounds + 1)
    right = (after.num_accepted_tokens - before.num_accepted_tokens) // (rounds + 1)
    slow, fast = (sum(map(statistics.median, times)) for times in seconds.values())
    return slow / fast, drafted, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path, help="built with --backend cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--drafted", type=int, help="tokens of a draft, at most")
    args = parser.parse_args()
    chat = load_chat(args.engine)
    plain = open_executor(args.engine, ExecutorOptions(speculative="off"))
    drafting = open_executor(
        args.engine,
        ExecutorOptions(speculative="ngram", num_speculative_tokens=args.drafted),
    )
    print("| | sequences | times as fast | drafted | right |")
    print("| --- | --- | --- | --- | --- |")
    for task, texts in TASKS.items():
        prompts = [chat.prompt([ChatMessage("user", text)], _LONGEST).ids for text in texts]
        for how, temperature in TEMPERATURES.items():
            requests = [
                Request(i, ids, SamplingParams(args.tokens, temperature, seed=i))
                for i, ids in enumerate(prompts)
            ]
            for beside in (1, _BESIDE):
                work = [requests[i : i + beside] for i in range(0, len(requests), beside)]
                ratio, drafted, right = compare(plain, drafting, work, args.rounds)
                share = f"{right / drafted:.0%}" if drafted else ""
                print(
                    f"| {task}, {how} | {beside} | {ratio:.2f} | {drafted} | {share} |", flush=True
                )
    for executor in (plain, drafting):
        executor.close()


if __name__ == "__main__":
    main()

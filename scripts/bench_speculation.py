"""What drafts by prompt lookup bring, and what they cost where they bring nothing: docs/cpu.md.

    python scripts/bench_speculation.py ENGINE [--rounds 9] [--tokens 128]

Two executors of one engine, with drafts and without, answer the same prompts in turn: one sequence
after the other, and four beside each other. Greedy, and drawn at a temperature of 0.8 with a seed.
Told is the ratio of their times, medians of the rounds, and of the cores' time, which others on the
machine disturb less; and how many of the drafted tokens were right. Answers must be the same.
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


def timed(
    executor: Executor, group: list[Request]
) -> tuple[tuple[float, float], dict[int, list[int]]]:
    """Seconds, also of the cores; and what was answered."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    answers = generate(executor, group)
    return (time.perf_counter() - began_s, time.process_time() - began_cpu_s), answers


def compare(
    plain: Executor, drafting: Executor, work: list[list[Request]], rounds: int
) -> tuple[list[float], int, int]:
    """How many times less time, and time of the cores, drafts make it; tokens drafted in a round,
    and how many of them were right.
    """
    before = drafting.stats()
    sums = {plain: [0.0, 0.0], drafting: [0.0, 0.0]}
    for group in work:
        seconds: dict[Executor, list[tuple[float, float]]] = {plain: [], drafting: []}
        for turn in range(rounds + 1):
            pair = (plain, drafting) if turn % 2 else (drafting, plain)
            found = {executor: timed(executor, group) for executor in pair}
            assert found[plain][1] == found[drafting][1], "drafts changed an answer"
            for executor, (taken, _) in found.items():
                if turn:  # the first fills the cache of prefixes
                    seconds[executor].append(taken)
        for executor, taken in seconds.items():
            for which, samples in enumerate(zip(*taken, strict=True)):
                sums[executor][which] += statistics.median(samples)
    after = drafting.stats()
    drafted = (after.num_draft_tokens - before.num_draft_tokens) // (rounds + 1)
    right = (after.num_accepted_tokens - before.num_accepted_tokens) // (rounds + 1)
    ratios = [slow / fast for slow, fast in zip(sums[plain], sums[drafting], strict=True)]
    return ratios, drafted, right


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
        ExecutorOptions(
            speculative="ngram",
            num_speculative_tokens=args.drafted,
            speculative_batch_size=_BESIDE,
        ),
    )
    print("| | sequences | times as fast | by the cores' time | drafted | right |")
    print("| --- | --- | --- | --- | --- | --- |")
    for task, texts in TASKS.items():
        prompts = [chat.prompt([ChatMessage("user", text)], _LONGEST).ids for text in texts]
        for how, temperature in TEMPERATURES.items():
            requests = [
                Request(i, ids, SamplingParams(args.tokens, temperature, seed=i))
                for i, ids in enumerate(prompts)
            ]
            for beside in (1, _BESIDE):
                work = [requests[i : i + beside] for i in range(0, len(requests), beside)]
                (wall, cpu), drafted, right = compare(plain, drafting, work, args.rounds)
                share = f"{right / drafted:.0%}" if drafted else ""
                cells = (f"{task}, {how}", beside, f"{wall:.2f}", f"{cpu:.2f}", drafted, share)
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for executor in (plain, drafting):
        executor.close()


if __name__ == "__main__":
    main()

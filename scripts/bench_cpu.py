"""Tokens a second of the compiled backend beside torch's, on one engine's rank files: docs/cpu.md.

Both executors are loaded in one process and take turns; what is printed are medians, and ratios of
medians. Run it on an idle machine, or take the ratios for what they are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from enginehouse.runtime.cpu.executor import CpuExecutor
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.executor import Executor, ExecutorOptions
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch.executor import TorchExecutor


def measured(executor: Executor, count: int, prompt: int, tokens: int, first: int) -> list[float]:
    """Prompt tokens a second, and decoded tokens a second, of count greedy requests at once."""
    rng = random.Random(first)
    params = SamplingParams(tokens, 0.0, ignore_eos=True)
    vocab = executor.info.vocab_size
    began = time.perf_counter()
    for i in range(count):
        ids = [rng.randrange(3, vocab) for _ in range(prompt)]
        executor.submit(Request(first + i, ids, params))
    waiting, done, prefilled, decoded = set(range(first, first + count)), 0, began, 0
    while done < count:
        for output in executor.poll():
            if output.request_id in waiting:
                waiting.discard(output.request_id)
                if not waiting:
                    prefilled = time.perf_counter()
                    decoded = 0
            decoded += len(output.token_ids)
            done += output.finish_reason is not None
    ended = time.perf_counter()
    return [count * prompt / (prefilled - began), decoded / (ended - prefilled)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    engine = read_engine(args.engine)
    options = ExecutorOptions(max_seq_len=args.prompt + args.tokens, num_threads=args.threads)
    executors = {kind.__name__: kind(engine, options) for kind in (CpuExecutor, TorchExecutor)}
    first = 0
    for count in args.sequences:
        found: dict[str, list[list[float]]] = {name: [] for name in executors}
        for _ in range(args.rounds + 1):  # the first is not counted
            for name, executor in executors.items():
                first += count
                found[name].append(measured(executor, count, args.prompt, args.tokens, first))
        ours, torchs = (
            [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
            for rounds in found.values()
        )
        for what, our, their in zip(("prefill", "decode"), ours, torchs, strict=True):
            print(
                f"{count:3} sequences, {what}: cpu {our:.0f}, torch {their:.0f} tokens/s, "
                f"{our / their:.2f}x"
            )


if __name__ == "__main__":
    main()

"""How far neighbours, the prefix cache and preemption change a sequence: docs/determinism.md.

For each compute dtype: a request alone; beside seven others; after its prompt was cached. Prints
how many of the answers changed, and the tokens a second of eight sequences at once.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams


def requests(count: int, tokens: int, vocab: int, seeded: bool, greedy: bool) -> list[Request]:
    """Seeded random prompts of 5 to 150 tokens."""
    rng = random.Random(1)
    made = []
    for i in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.randrange(5, 150))]
        params = SamplingParams(
            tokens, 0.0 if greedy else 0.8, seed=i if seeded else None, ignore_eos=True
        )
        made.append(Request(i, prompt, params))
    return made


def alone(executor: Executor, work: list[Request]) -> list[list[int]]:
    return [generate(executor, [request])[request.request_id] for request in work]


def differing(first: list[list[int]], second: list[list[int]]) -> str:
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    return f"{changed} of {len(first)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in ("float32", "bfloat16"):
        for deterministic in (False, True):
            options = ExecutorOptions(
                max_seq_len=256,
                max_batch_size=8,
                compute_dtype=dtype,
                num_threads=args.threads,
                deterministic=deterministic,
            )
            executor = open_executor(args.engine, options)
            vocab = executor.info.vocab_size
            line = [f"{dtype} deterministic={deterministic}"]
            for name, seeded, greedy in (("greedy", False, True), ("seeded", True, False)):
                work = requests(args.count, args.tokens, vocab, seeded, greedy)
                first = alone(executor, work)
                again = alone(executor, work)
                together: dict[int, list[int]] = {}
                began_s = time.perf_counter()
                together = generate(executor, work)
                wall_s = time.perf_counter() - began_s
                beside = [together[request.request_id] for request in work]
                line.append(
                    f"{name}: again {differing(first, again)}, beside others "
                    f"{differing(first, beside)}, "
                    f"{args.count * args.tokens / wall_s:.0f} tokens/s"
                )
            print("; ".join(line), flush=True)
            executor.close()


if __name__ == "__main__":
    main()

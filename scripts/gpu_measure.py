"""What an engine answers to fixed prompts, greedily, and how fast: one step of `gpu_check.py`.

    python scripts/gpu_measure.py ENGINE --device engine --out measured.json

A process of its own, as an engine that crashes must take nothing along. Exit status 1 when a
sequence fails, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import Executor, ExecutorOptions
from enginehouse.runtime.request import FinishReason, Request, SamplingParams

BATCHES = (1, 4, 16, 64)
NUM_PROMPTS, NUM_TOKENS, PROMPT_LEN = 8, 64, 128
DEVICES = ("engine", "cpu", "cuda")


def options_for(device: str) -> ExecutorOptions:
    """engine: a compiled engine's own. cpu: the reference. cuda: the torch backend on the GPU."""
    if device == "engine":
        return ExecutorOptions()
    if device == "cpu":
        return ExecutorOptions(compute_dtype="float32", kv_cache_gib=1.0, device="cpu")
    return ExecutorOptions(device=device)


def measure(engine: Path, device: str) -> dict[str, Any]:
    """Greedy answers to fixed prompts, one at a time; then figures for each batch size."""
    executor = open_executor(engine, options_for(device))
    try:
        vocab = executor.info.vocab_size
        answers = [
            generate(executor, [fixed_prompt(i, vocab)], NUM_TOKENS)[0][0]
            for i in range(NUM_PROMPTS)
        ]
        batches = (
            [] if device == "cpu" else [b for b in BATCHES if b <= executor.info.max_batch_size]
        )
        figures = []
        for batch in batches:
            prompts = [fixed_prompt(1000 * batch + i, vocab) for i in range(batch)]
            tokens, first_s, total_s = generate(executor, prompts, NUM_TOKENS)
            count = sum(map(len, tokens))
            step_s = (total_s - first_s) / (NUM_TOKENS - 1)
            figures.append(
                {
                    "batch": batch,
                    "tokens_per_s": count / total_s,
                    "first_s": first_s,
                    "step_s": step_s,
                }
            )
        return {"answers": answers, "figures": figures}
    finally:
        executor.close()


def fixed_prompt(number: int, vocab_size: int) -> list[int]:
    """PROMPT_LEN token ids that differ from any other number's from the first on."""
    state, ids = number * 7919 + 17, []
    for _ in range(PROMPT_LEN):
        state = (state * 1103515245 + 12345) % 2**31
        ids.append(8 + (state >> 8) % (vocab_size - 8))
    return ids


def generate(
    executor: Executor, prompts: list[list[int]], max_tokens: int
) -> tuple[list[list[int]], float, float]:
    """Tokens of each prompt, mean seconds to the first of them, seconds in all."""
    sampling = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    first_s: dict[int, float] = {}
    began_s = time.monotonic()
    for i, prompt in enumerate(prompts):
        executor.submit(Request(i, prompt, sampling))
    while executor.busy:
        for output in executor.poll(0.01):
            if output.finish_reason is FinishReason.ERROR:
                raise SystemExit(f"a sequence failed: {output.error}")
            if output.token_ids:
                first_s.setdefault(output.request_id, time.monotonic() - began_s)
                tokens[output.request_id] += output.token_ids
    total_s = time.monotonic() - began_s
    return tokens, sum(first_s.values()) / len(prompts), total_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--device", choices=DEVICES, default="engine")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file that is written")
    args = parser.parse_args()
    args.out.write_text(json.dumps(measure(args.engine, args.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

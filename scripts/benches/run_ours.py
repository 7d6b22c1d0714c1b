"""One of our engines in this process: `run_ours.py ENGINE BACKEND`, asked by lines.

BACKEND: cpu or torch, on the same rank files.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from child import Operation, answer


def open_all() -> dict[str, Operation]:
    engine_dir, backend = Path(sys.argv[1]), sys.argv[2]
    from enginehouse.runtime.executor import Executor
    from enginehouse.runtime.request import Request, SamplingParams

    executor: Executor
    if backend == "torch":
        from enginehouse.runtime.engine import read_engine
        from enginehouse.runtime.executor import ExecutorOptions
        from enginehouse.runtime.torch.executor import TorchExecutor

        executor = TorchExecutor(read_engine(engine_dir), ExecutorOptions())
    else:
        from enginehouse.runtime.backends import open_executor
        from enginehouse.runtime.executor import ExecutorOptions

        # Peers draft nothing either: compared is what a token takes.
        executor = open_executor(engine_dir, ExecutorOptions(speculative="off"))
    next_id = 0

    def submit(ids: list[int], tokens: int) -> int:
        nonlocal next_id
        next_id += 1
        params = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
        executor.submit(Request(next_id, ids, params))
        return next_id

    def steps(
        prompts: list[dict[str, Any]],
        tokens: int,
        late: dict[str, Any] | None = None,
        after: int = 32,
        bounded: bool = True,
    ) -> dict[str, Any]:
        """late: a prompt that comes once each of the others has `after` tokens; 1 token out.
        bounded: whether prompts are computed in pieces while others are answered.
        """
        scheduler = executor.scheduler
        usual, scheduler.prefill = scheduler.prefill, scheduler.prefill if bounded else None
        began = time.perf_counter()
        times: dict[int, list[float]] = {submit(p["ids"], tokens): [] for p in prompts}
        streams, late_id, late_at = list(times.values()), None, None
        while executor.busy:
            if late is not None and late_id is None and min(map(len, streams)) >= after:
                late_at = time.perf_counter() - began
                late_id = submit(late["ids"], 1)
                times[late_id] = []
            outputs = executor.poll(0.1)
            now = time.perf_counter() - began
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(output.error)
                times[output.request_id] += [now] * len(output.token_ids)
        wall = time.perf_counter() - began
        scheduler.prefill = usual
        late_done = times[late_id][0] if late_id is not None else None
        return {"wall_s": wall, "times": streams, "late": [late_at, late_done]}

    def profile(prompts: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        from profiled import profiled

        return profiled(executor, lambda: steps(prompts, tokens), tokens)

    both = {"run": steps, "steps": steps}
    return both if backend == "torch" else {**both, "profile": profile}


if __name__ == "__main__":
    answer(open_all)

"""Where the time of an iteration goes, of the compiled backend's executor while it decodes.

Wraps what the loop calls, and reads the kernels' own clock; knows no request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

_LEFT_OUT = 8  # of the first iterations: prompts are computed in them


def profiled(executor: Any, run: Callable[[], object], tokens: int) -> dict[str, float]:
    """Milliseconds of an iteration by part, each the median of the iterations that only decode.

    sampling: all that becomes of logits, Python included. around: what calls the kernels.
    scheduling: the rest of an iteration.
    """
    kernels = executor.runner.model.seconds
    iterations: list[dict[str, float]] = []
    spent = {"choosing": 0.0, "computing": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    poll, compute = executor.poll, executor._compute
    of_runner = executor.runner.compute

    def watched(*args: Any) -> Any:
        before, began = kernels(), time.perf_counter()
        spent.update(choosing=0.0, computing=0.0)
        told = poll(*args)
        whole = time.perf_counter() - began
        parts = {name: value - before[name] for name, value in kernels().items()}
        parts["sampling"] = spent["choosing"] - spent["computing"]
        parts["around"] = spent["computing"] - sum(
            parts[name] for name in ("linears", "attention", "head", "rows")
        )
        parts["scheduling"] = whole - spent["choosing"]
        iterations.append(parts)
        return told

    executor.poll = watched
    executor._compute = timed("choosing", compute)
    executor.runner.compute = timed("computing", of_runner)
    try:
        run()
    finally:
        del executor.poll, executor._compute, executor.runner.compute
    decoding = iterations[-(tokens - _LEFT_OUT) :]
    return {
        name: 1e3 * statistics.median(parts[name] for parts in decoding) for name in decoding[0]
    }

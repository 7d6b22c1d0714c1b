"""OpenVINO GenAI in this process: `run_openvino.py GGUF CACHE_GIB`, asked by lines.

Its pipeline with continuous batching, which is what LLMPipeline runs when it is given a scheduler.
It is given token ids, so that nothing is tokenised.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from child import Operation, answer


def open_all() -> dict[str, Operation]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = int(sys.argv[2])
    scheduler.max_num_batched_tokens = 512
    pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")
    next_id = 0

    def config(tokens: int) -> Any:
        made = genai.GenerationConfig()
        made.max_new_tokens = tokens
        made.ignore_eos = True
        made.do_sample = False
        return made

    def tensor(ids: list[int]) -> Any:
        return ov.Tensor(np.asarray([ids], dtype=np.int64))

    def run(prompts: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """In its own loop, in C++."""
        tensors = [tensor(prompt["ids"]) for prompt in prompts]
        began = time.perf_counter()
        results = pipe.generate(tensors, [config(tokens)] * len(tensors))
        wall = time.perf_counter() - began
        for result in results:
            [ids] = result.m_generation_ids
            if len(ids) != tokens:
                raise RuntimeError(f"{len(ids)} tokens; wanted {tokens}")
        return {"wall_s": wall}

    def steps(
        prompts: list[dict[str, Any]],
        tokens: int,
        late: dict[str, Any] | None = None,
        after: int = 32,
    ) -> dict[str, Any]:
        """As run_ours.py's."""
        began = time.perf_counter()

        def add(ids: list[int], count: int) -> Any:
            nonlocal next_id
            next_id += 1
            return pipe.add_request(next_id, tensor(ids), config(count))

        handles = [add(prompt["ids"], tokens) for prompt in prompts]
        times: list[list[float]] = [[] for _ in handles]
        late_handle, late_at, late_done = None, None, None
        while pipe.has_non_finished_requests():
            if late is not None and late_handle is None and min(map(len, times)) >= after:
                late_at = time.perf_counter() - began
                late_handle = add(late["ids"], 1)
            pipe.step()
            now = time.perf_counter() - began
            for stream, handle in zip(times, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        stream += [now] * len(output.generated_ids)
            if late_done is None and late_handle is not None and late_handle.can_read():
                late_done = now
        return {
            "wall_s": time.perf_counter() - began,
            "times": times,
            "late": [late_at, late_done],
        }

    return {"run": run, "steps": steps}


if __name__ == "__main__":
    answer(open_all)

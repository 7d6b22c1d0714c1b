"""What prompts may take of an iteration is learnt, and kept to."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching import inflight_executor
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.model_runner import Logits, Score
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sequence import Chunk
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.request import Request, SamplingParams
from makers.engines import EngineMaker

# Milliseconds of an iteration, of each decode and of each token of a prompt in it.
MACHINES = {
    "small model": (2.5, 0.53, 0.35),
    "large model": (120.0, 4.0, 14.0),
    "quick prompts": (20.0, 0.05, 0.02),
}


def run(machine: tuple[float, float, float], budget: PrefillBudget) -> None:
    """A first prompt, sixteen that join, many decodes and a long prompt; measured with scatter, as
    on a machine where something else runs now and then.
    """
    random.seed(3)
    own, decode, token = machine

    def iterate(num_decodes: int, num_tokens: int, slower: float = 1.0) -> None:
        seconds = (own + decode * num_decodes + token * num_tokens) / 1000
        noise = random.gauss(1, 0.05) * (3 if random.random() < 0.03 else 1)
        budget.learn(seconds * noise * slower, num_decodes, num_tokens)

    iterate(0, 500, slower=3.0)  # pages are touched for the first time
    for joined in range(1, 16):
        for _ in range(3):
            iterate(joined, budget.tokens(joined))
    for _ in range(300):
        iterate(16, 0)
    for _ in range(60):
        iterate(16, budget.tokens(16))


@pytest.mark.parametrize("name", MACHINES)
def test_prompts_get_three_quarters_of_what_decoding_takes(name: str) -> None:
    own, decode, token = MACHINES[name]
    budget = PrefillBudget()
    run(MACHINES[name], budget)
    wanted = max(8, 0.75 * (own + decode * 16) / token)
    assert 0.75 * wanted <= budget.tokens(16) <= 1.25 * wanted


def test_prompts_get_the_milliseconds_that_are_set() -> None:
    budget = PrefillBudget(20.0)
    run(MACHINES["small model"], budget)
    assert 0.75 * 20 / 0.35 <= budget.tokens(16) <= 1.25 * 20 / 0.35


class Watched:
    """A runner whose iterations take the time that a machine's would: on a clock of its own."""

    def __init__(self, executor: InflightExecutor[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.seen: list[list[tuple[int, int]]] = []  # of each iteration the chunks' sizes
        self.seconds: list[float] = []
        self._compute = executor.runner.compute
        monkeypatch.setattr(executor.runner, "compute", self.compute)
        monkeypatch.setattr(inflight_executor.time, "perf_counter", lambda: self.now_s)

    def compute(self, chunks: list[Chunk], score: Score) -> Logits:
        sizes = [(c.sequence.request.request_id, c.num_tokens) for c in chunks]
        decodes = sum(size == 1 for _, size in sizes)
        tokens = sum(size for _, size in sizes) - decodes
        self.seen.append(sizes)
        self.seconds.append((8 + decodes + 0.5 * tokens) / 1000)
        self.now_s += self.seconds[-1]
        return self._compute(chunks, score)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_long_prompt_holds_nobody_up_and_is_whole_when_nothing_else_runs(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    engine = make_engine(quant="none", dtype="bfloat16", backend=backend, until="compile")
    executor = open_executor(engine, ExecutorOptions(max_num_tokens=200, num_threads=1))
    assert isinstance(executor, InflightExecutor)
    watched = Watched(executor, monkeypatch)
    prompt = [i % 97 + 3 for i in range(180)]
    for i in range(4):
        params = SamplingParams(40, temperature=0.0, ignore_eos=True, seed=i)
        executor.submit(Request(i, prompt[i:20], params))
    for _ in range(20):
        executor.poll()
    executor.submit(Request(9, prompt, SamplingParams(1, seed=9)))
    while executor.busy:
        executor.poll()
    pieces = [size for sizes in watched.seen for number, size in sizes if number == 9]
    assert sum(pieces) == len(prompt) and len(pieces) > 6 and min(pieces[:-1]) >= 8
    alone_s = 0.012
    assert max(watched.seconds[5:]) < 2 * alone_s
    executor.submit(Request(9, prompt, SamplingParams(1, seed=9)))
    executor.poll()
    assert watched.seen[-1] == [(9, len(prompt))]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_llm"])
def test_a_time_for_prompts_is_refused_where_a_gpu_computes(
    make_engine: EngineMaker, tmp_path: Path, backend: str
) -> None:
    engine = Path(shutil.copytree(make_engine(), tmp_path / "engine"))
    manifest = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))
    manifest["backend"] = backend
    (engine / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(EngineError, match=f"prefill_ms .* this is backend={backend}; leave it out"):
        open_executor(engine, ExecutorOptions(prefill_ms=5.0))

"""TensorRT's runner on doubles of its runtime and of CUDA: the torch backend's tokens, and no slot
touched that must not be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SourceMaker
from tensorrt_machine import doubled_engine, doubled_machine

from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.executor import ExecutorOptions, generate, open_executor
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch_executor import TorchExecutor

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 6, 7], list(range(40, 90)), [11], list(range(300, 417))]
FLOAT32 = ExecutorOptions(compute_dtype="float32", device="cpu")


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)


def requests(prompts: list[list[int]], sampling: SamplingParams) -> list[Request]:
    return [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]


def torch_answers(engine: Path, work: list[Request]) -> dict[int, list[int]]:
    """The torch backend's from the same rank files."""
    executor = TorchExecutor(read_engine(engine), FLOAT32)
    try:
        return generate(executor, work)
    finally:
        executor.close()


CASES = [
    ("llama", "none", 1),
    ("llama", "int4", 2),
    ("qwen2", "fp8", 1),
    ("qwen3", "fp8_rowwise", 1),
    ("gemma2", "int8", 1),
    ("gemma3", "none", 1),
    ("phi3-longrope", "none", 1),
    ("biased", "none", 2),
]


@pytest.mark.parametrize(("family", "quant", "tp"), CASES)
def test_greedy_tokens_equal_the_torch_backends(
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quant: str,
    tp: int,
) -> None:
    """Ragged prompts in chunks, in flight together; longrope's threshold is crossed."""
    settings = dict(quant=quant, tp=tp, max_seq_len=256)
    engine = doubled_engine(family_source(family), tmp_path / "e", **settings)
    work = requests(PROMPTS, greedy())
    wanted = torch_answers(engine, work)
    with doubled_machine(monkeypatch, tp):
        executor = open_executor(engine)
        found = generate(executor, work)
        executor.close()
    assert found == wanted

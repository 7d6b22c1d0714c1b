"""Requests with a constraint, and what the torch backend answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    Request,
    SamplingParams,
    TokenOutput,
)
from enginehouse.runtime.torch.executor import TorchExecutor

OPTIONS = ExecutorOptions(compute_dtype="float32", max_batch_size=8)


class Answer:
    """What one request gave in the end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[TokenOutput] = []

    @property
    def last(self) -> TokenOutput:
        return self.outputs[-1]


def run(executor: TorchExecutor, requests: list[Request]) -> dict[int, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll(0.1):
            answers[output.request_id].outputs.append(output)
            answers[output.request_id].token_ids += output.token_ids
    return answers


def open_torch(engine: Path, options: ExecutorOptions = OPTIONS) -> TorchExecutor:
    executor = open_executor(engine, options)
    assert isinstance(executor, TorchExecutor)
    return executor


def constrained(
    kind: ConstraintKind, value: str, max_tokens: int = 60, **params: Any
) -> SamplingParams:
    return SamplingParams(max_tokens, constraint=Constraint(kind, value), **params)


def words(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False)
    return text

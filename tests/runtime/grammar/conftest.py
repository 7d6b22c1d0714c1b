"""A tiny engine in float32, opened once a file, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from enginehouse.runtime.torch.executor import TorchExecutor
from makers.constrained import open_torch
from makers.engines import EngineMaker


@pytest.fixture(scope="module")
def engine(make_engine: EngineMaker) -> Path:
    return make_engine(quant="none", dtype="float32")


@pytest.fixture(scope="module")
def executor(engine: Path) -> Iterator[TorchExecutor]:
    running = open_torch(engine)
    yield running
    running.close()


@pytest.fixture(scope="module")
def tokenizer(engine: Path) -> Tokenizer:
    return Tokenizer.from_file(str(engine / "tokenizer.json"))

"""Tiny seeded checkpoints and engines made from them, once a session; and the sample model."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: torch, and what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most servers of these tests are asked for no grammar.
os.environ.setdefault("ENGINEHOUSE_GRAMMARS_AT_ONCE", "0")
# Without Intel's AMX, whose float32 products round their factors to bfloat16 where calibration lets
# them: tests compare with exact ones, and greedy answers of tiny models turn on the last bits.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint

pytest.register_assert_rewrite("makers")

from makers.engines import (  # noqa: E402
    EngineMaker,
    SourceMaker,
    build_engine,
    write_tiny_checkpoint,
)
from makers.paths import ROOT  # noqa: E402
from makers.thorough import THOROUGH, is_asked  # noqa: E402


class FailuresAtOnce:
    """Names what failed when it fails: a run that is cut off does not come to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            writer = self.config.get_terminal_writer()
            writer.line(f"\nFAILED {report.nodeid}\n{report.longreprtext}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(FailuresAtOnce(config))


# Files that take half a minute or more and would come late: begun last, one would run alone.
LONG = {
    "test_chat_page.py",
    "test_ci_recipes.py",
    "test_gunicorn.py",
    "test_installed.py",
    "test_json_schemas.py",
    "test_openapi.py",
    "test_page_for_all.py",
    "test_serve.py",
    "test_tiny_model.py",
    "test_tools.py",
    "test_trtllm_path.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    left_out = [] if THOROUGH else [item for item in items if not is_asked(item)]
    if left_out and len(config.args) == 1 and "::" in config.args[0]:
        return  # a test that is named is asked
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """What all files imported stays: no later search for garbage looks through it again."""
    gc.collect()
    gc.freeze()


set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that TP 1, 2 and 4 can cut, int4 groups of 64 included."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_source(tiny_checkpoint: Path) -> SourceCheckpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def make_engine(
    tiny_source: SourceCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> EngineMaker:
    """make_engine(quant="int4", tp=2, ...): the tiny model's engine, built once for each choice.

    With one thread, whichever test asks first: scales that are found by sums would else differ in
    their last bits, and tokens with them.
    """
    made: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("engines") / "tiny"
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                made[key] = build_engine(tiny_source, output, **settings)
            finally:
                torch.set_num_threads(threads)
        return made[key]

    return make


@pytest.fixture(scope="session")
def family_source(tmp_path_factory: pytest.TempPathFactory) -> SourceMaker:
    """family_source("gemma2"): a tiny checkpoint of a family, in float32; "llama" is in bfloat16
    and without biases, "biased" with them.
    """
    from makers.family_models import FAMILIES, save_family  # transformers, which takes seconds

    made: dict[str, SourceCheckpoint] = {}

    def make(name: str) -> SourceCheckpoint:
        if name not in made:
            path = tmp_path_factory.mktemp("source") / name
            if name in FAMILIES and name != "llama":
                save_family(name, path)
            else:
                biased = name == "biased"
                write_tiny_checkpoint(path, attention_bias=biased, mlp_bias=biased, seed=1)
            made[name] = resolve_source(str(path), path)
        return made[name]

    return make


@pytest.fixture(scope="session")
def sample_source() -> SourceCheckpoint:
    """SmolLM2-135M-Instruct, from the cache that `make test` shares with `make serve`."""
    return resolve_source(None, ROOT / ".cache", lambda line: None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that a second thread only costs time, and much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""How ranks end on the doubles: in which order things go, also where starting or a rank failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from doubles.tensorrt_double import Context
from doubles.tensorrt_machine import doubled_engine, doubled_machine, greedy, requests
from doubles.tensorrt_ranks import ThreadCommunicator
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import generate
from enginehouse.runtime.tensorrt.rank import TensorRTRank
from makers.engines import SourceMaker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("close") / "e"
    return doubled_engine(family_source("llama"), path, quant="none", max_seq_len=64, tp=2)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happened to which rank as it ended, in order."""
    seen: list[tuple[str, int]] = []
    real_close, real_abort = TensorRTRank.close, ThreadCommunicator.abort
    ranks: dict[int, TensorRTRank] = {}

    def close(self: TensorRTRank) -> None:
        ranks[self.rank] = self
        real_close(self)
        seen.append(("closed", self.rank))

    def abort(self: ThreadCommunicator) -> None:
        owner = ranks.get(self.rank)
        contexts = 0 if owner is None else len(owner.plans)
        seen.append(("aborted, with contexts" if contexts else "aborted", self.rank))
        real_abort(self)

    monkeypatch.setattr(TensorRTRank, "close", close)
    monkeypatch.setattr(ThreadCommunicator, "abort", abort)
    return seen


def test_contexts_go_before_their_communicator(
    engine: Path, monkeypatch: pytest.MonkeyPatch, closed: list[tuple[str, int]]
) -> None:
    with doubled_machine(monkeypatch, 2):
        executor = open_executor(engine)
        generate(executor, requests([[5, 6, 7]], greedy(2)))
        executor.close()
    for rank in range(2):
        mine = [what for what, its in closed if its == rank]
        assert mine == ["aborted", "closed"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_does_not_end_is_ended_by_its_communicator(
    engine: Path, monkeypatch: pytest.MonkeyPatch, closed: list[tuple[str, int]], fails: bool
) -> None:
    """It waits for a rank that is gone, or CUDA has failed."""

    def query() -> bool:
        if fails:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return False

    with doubled_machine(monkeypatch, 2):
        executor = open_executor(engine)
        monkeypatch.setattr("enginehouse.runtime.tensorrt.rank._END_S", 0.05)
        event = SimpleNamespace(record=lambda: None, query=query)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        monkeypatch.setattr(executor.runner, "_keep_kernels", lambda: None)
        executor.close()
    mine = [what for what, its in closed if its == 0]
    assert mine == ["aborted, with contexts", "aborted", "closed"]


def test_a_warm_up_that_fails_leaves_nothing_behind(
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: list[tuple[str, int]],
) -> None:
    def refuse(context: Context, stream: int) -> bool:
        context._refuse("no kernel for this shape")
        return False

    path = doubled_engine(family_source("llama"), tmp_path / "e", quant="none", max_seq_len=64)
    monkeypatch.setattr(Context, "execute_async_v3", refuse)
    with doubled_machine(monkeypatch):
        with pytest.raises(EngineError, match=r"cannot run \S+: no kernel for this shape$"):
            open_executor(path)
    assert closed == [("closed", 0)]
    assert not path.with_name("e.kernels").exists(), "what has not run is not kept"

"""Every backend that serves here is judged alike: torch, and TensorRT-LLM by its double."""

from __future__ import annotations

from pathlib import Path

import pytest

from doubles.trtllm_double import double_environment, install_double
from enginehouse.build import cli
from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.judge.comparison import Comparison
from enginehouse.regress.judge.numerics import judge_divergence, judge_self, text_divergences
from enginehouse.regress.limits import load_limits
from enginehouse.regress.recording import Recording
from enginehouse.regress.run import Plan, record
from enginehouse.regress.suite.long_texts import ledger
from enginehouse.regress.suite.suite import Prompt, Suite, Text
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")
SUITE = Suite(
    "tiny",
    [Text("ledger", "long", ledger(3))],
    [Prompt("ask", messages=[{"role": "user", "content": "How far is it?"}], max_tokens=6)],
    [],
)


def judged(engine: Path) -> tuple[Recording, dict[str, Finding]]:
    """Recorded, and judged by its own recording."""
    plan = Plan(str(engine), None, SUITE, load_limits(), groups=("numerics",))
    recording = record(plan, lambda line: None)
    both = Comparison(recording, recording, plan.limits)
    findings = [*judge_divergence(both, text_divergences(both)), *judge_self(both)]
    return recording, {finding.check: finding for finding in findings}


def test_torch_is_judged_and_may_be_as_far_from_itself_as_it_is(
    make_engine: EngineMaker,
) -> None:
    recording, found = judged(make_engine(quant="int4"))
    assert recording.scores and {each.status for each in found.values()} == {Status.PASSED}
    assert found["batch"].figures["limit"] == load_limits().self_kl["torch"]


def test_tensorrt_llm_is_judged_by_what_it_tells(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine was built without the logits of prompts: texts are not scored, and it says so."""
    install_double(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", double_environment()["PYTHONPATH"])
    flags = ["--backend", "tensorrt_llm", "--quant", "none", "--compute-dtype", "float32"]
    flags += ["--max-batch-size", "8", "--kv-block-size", "16", "--quiet"]
    engine = tmp_path / "engine"
    assert cli.main([str(tiny_checkpoint), *flags, "-o", str(engine)]) == 0
    recording, found = judged(engine)
    assert recording.answers and found["answer_kl"].status is Status.PASSED
    assert found["batch"].status is found["prefix"].status is Status.PASSED
    assert not recording.scores and found["kl"].status is Status.NOT_JUDGED
    assert "gather_context_logits" in " ".join(recording.head.left_out.values())

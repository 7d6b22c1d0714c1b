"""The two sets of packages that CI resolves. The resolver itself wants a package index."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from packaging.requirements import Requirement

from enginehouse.runtime.grammar.support import TENSORRT_LLM
from makers.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "check_resolve.py"))
main, requirements, locked_names = (
    SCRIPT[name] for name in ("main", "requirements", "locked_names")
)


def test_the_sets_hold_what_the_product_and_tensorrt_llm_want() -> None:
    cpu = {Requirement(line).name for line in requirements("cpu")}
    trtllm = {Requirement(line).name for line in requirements("trtllm")}
    assert {"torch", "xgrammar", "pytest", "ruff"} <= cpu
    assert {"torch", "xgrammar", "flask", "mpi4py", "triton", "transformers"} <= trtllm
    assert not {"tensorrt-llm", "tensorrt"} & trtllm
    assert {name.lower().replace("_", "-") for name in cpu} <= locked_names()


def test_what_does_not_resolve_is_named_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(name: str, python: str) -> dict[str, str]:
        if (name, python) == ("trtllm", "3.10"):
            raise RuntimeError("there is no version of torch")
        return {"torch": "2.9.1", "nvidia-nccl-cu13": "2", "torch-friend": "1"}

    monkeypatch.setitem(main.__globals__, "resolve", resolve)
    assert main(["--set", "trtllm"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "trtllm on 3.10: does not resolve",
        "there is no version of torch",
        "trtllm on 3.12: 3 packages; torch 2.9.1",
    ]
    assert main(["--set", "trtllm", "--python", "3.12"]) == 0
    assert main(["--set", "cpu", "--python", "3.13"]) == 1
    assert "constraints.txt pins no version of torch-friend" in capsys.readouterr().out


def test_a_python_that_no_set_is_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--python", "3.9"]) == 1
    assert "no set is for 3.9; wanted one of 3.10, 3.11" in capsys.readouterr().out


def test_uv_is_asked_for_the_pythons_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append((command, options))
        return type("Done", (), {"returncode": 0, "stdout": "a_b==1.0\nc==2\n", "stderr": ""})

    subprocess = main.__globals__["subprocess"]
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror/simple")
    assert SCRIPT["resolve"]("cpu", "3.10") == {"a-b": "1.0", "c": "2"}
    command, options = asked[0]
    assert command[command.index("--python-version") + 1] == "3.10"
    assert command[command.index("--constraints") + 1] == str(ROOT / "constraints.txt")
    assert command[command.index("--default-index") + 1] == "https://mirror/simple"
    assert options["input"].splitlines() == requirements("cpu")


def test_constraints_follow_the_xgrammar_that_tensorrt_llm_pins() -> None:
    assert f"xgrammar=={TENSORRT_LLM.version}" in SCRIPT["OF_TENSORRT_LLM"]

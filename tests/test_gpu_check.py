"""The GPU check: its arithmetic, its report, and that a failing step stops nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from doubles.cuda_double import cuda_double
from makers.engines import EngineMaker
from makers.paths import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"
KINDS = ("tensorrt", "tensorrt-parts", "tensorrt-baked")
H100 = dict(tensorrt_llm="1.2.1", tensorrt="10.14", cuda="13.0", sm="90", gpu="NVIDIA H100")


def load_script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():  # type: ignore[no-untyped-def]
    return load_script("gpu_check")


@pytest.fixture(scope="module")
def measuring():  # type: ignore[no-untyped-def]
    return load_script("gpu_measure")


def test_a_dry_run_prints_every_step_and_starts_none() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run"], capture_output=True, text=True, timeout=60
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    for model in ("sample", "random-1b"):
        for quant in ("fp8", "int4_awq"):
            for step in ("CPU engine", "compile", "compare and measure", "serve"):
                assert f"== {model} {quant}: {step}" in lines
            steps = [f" plans, {kind}" for kind in KINDS]
            steps += [f", compare and measure {kind}" for kind in KINDS]
            for step in (*steps, ", side by side", ", serve"):
                assert f"== {model} {quant}: TensorRT{step}" in lines
    assert "== TensorRT-RTX: what it says of this GPU" in lines
    assert lines[-2] == (
        "== without TensorRT-LLM: no compile; the torch backend runs with device cuda"
    )
    assert lines[-1].startswith("== report: docs/gpu/")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path)},
    )
    assert result.returncode == 2 and "shows no GPU" in result.stderr


def test_a_failing_step_is_reported_and_stops_nothing(script) -> None:  # type: ignore[no-untyped-def]
    report = script.Report(H100, "tensorrt_llm")

    def fail() -> str:
        raise script.StepFailed("no | kernel\nat all", "line\n" * 100 + "the end")

    assert not report.step("compile", fail) and report.step("serve", lambda: "fast")
    assert report.failed == ["compile"]
    text = report.text()
    assert "| compile | failed: StepFailed: no / kernel |" in text
    assert text.count("\nline") == 79 and "\nthe end\n" in text, "the last 80 lines are kept"
    assert "| serve | ok, 0 s |" in text and "## serve\n\nfast" in text
    assert report.path().name.endswith("-nvidia-h100.md")


def test_a_child_that_fails_or_hangs_gives_its_last_line(script) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-S", "-c"]
    with pytest.raises(script.StepFailed, match="exit status 3: the reason"):
        script.run([*command, "print('x'); print('the reason'); raise SystemExit(3)"], 30)
    hang = "print('waiting', flush=True); import time; time.sleep(60)"
    with pytest.raises(script.StepFailed, match="not done in 1 s; it said last: waiting"):
        script.run([*command, hang], 1)


def test_measure_gives_the_engines_greedy_tokens(
    measuring,  # type: ignore[no-untyped-def]
    make_engine: EngineMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(quant="none", dtype="float32", until="compile")
    monkeypatch.setattr(measuring, "NUM_PROMPTS", 2)
    monkeypatch.setattr(measuring, "BATCHES", (1, 2))
    found = json.loads(json.dumps(measuring.measure(engine, "cpu")))
    assert [len(answer) for answer in found["answers"]] == [64, 64] and found["figures"] == []
    again = measuring.measure(engine, "engine")
    assert [row["batch"] for row in again["figures"]] == [1, 2]
    assert all(0 < row["first_s"] and 0 < row["tokens_per_s"] for row in again["figures"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_torch_backend_runs_where_it_is_told(measuring, device: str) -> None:  # type: ignore[no-untyped-def]
    assert measuring.options_for(device).device == device


def test_measure_runs_on_the_gpu(
    measuring,  # type: ignore[no-untyped-def]
    make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(quant="fp8", until="compile")
    for name, value in (("NUM_PROMPTS", 1), ("NUM_TOKENS", 4), ("BATCHES", (2,))):
        monkeypatch.setattr(measuring, name, value)
    with cuda_double(monkeypatch) as gpu:
        found = measuring.measure(engine, "cuda")
    assert "_scaled_mm" in gpu.products and [row["batch"] for row in found["figures"]] == [2]
    assert len(found["answers"][0]) == 4


def test_prompts_differ_from_their_first_tokens_on(measuring) -> None:  # type: ignore[no-untyped-def]
    prompts = [measuring.fixed_prompt(number, 512) for number in range(200)]
    assert all(8 <= token < 512 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 200, "no block is shared"


@pytest.mark.parametrize(
    ("one", "other", "count"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1], 1), ([], [1], 0)]
)
def test_the_common_beginning(script, one, other, count) -> None:  # type: ignore[no-untyped-def]
    assert script.common(one, other) == count


def test_tensorrt_is_asked_in_its_own_words() -> None:
    """The real compiler and runtime, which here have no driver to load a plan with."""
    command = [sys.executable, SCRIPT.with_name("gpu_probe.py"), "tensorrt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("TensorRT-RTX 1.") and "get_engine_validity: INVALID" in lines
    assert lines[-1].startswith("deserialize_cuda_engine: TensorRT loads it not: ")


@pytest.mark.parametrize(
    ("sm", "outcome"),
    [("90", "left out: TensorRT-RTX has no target SM90"), (None, "left out: TensorRT-RTX has no")],
)
def test_a_gpu_without_a_target_is_asked_about_all_the_same(
    script,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    sm: str | None,
    outcome: str,
) -> None:
    report = script.Report({**H100, "sm": sm}, "torch")
    monkeypatch.setattr(script, "ask_tensorrt", lambda: "INVALID")
    script.check_tensorrt(report)
    assert "INVALID" in report.text()
    assert report.outcomes[-1][0] == "TensorRT plans" and report.outcomes[-1][1].startswith(outcome)


@pytest.mark.parametrize("broken", [None, "tensorrt", "tensorrt-parts"])
def test_plans_are_built_compared_and_served(
    script,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    broken: str | None,
) -> None:
    """Every step's call, in order; a build that fails leaves out what needs it."""
    calls: list[tuple[object, ...]] = []

    def note(*call: object) -> str:
        calls.append(call)
        if call[0] == "build" and call[3] == broken:
            raise script.StepFailed("no")
        return ""

    for name in ("ask_tensorrt", "build", "compare", "side_by_side", "serve"):
        monkeypatch.setattr(script, name, lambda *a, name=name: note(name, *a))
    monkeypatch.setattr(script, "MODELS", {"sample": None})
    monkeypatch.setattr(script, "QUANTS", ("fp8",))
    script.check_tensorrt(script.Report({**H100, "sm": "89"}, "torch"))
    wanted: list[tuple[object, ...]] = [("ask_tensorrt",)]
    for kind in KINDS:
        wanted.append(("build", "sample", "fp8", kind, "--sm=89"))
        if kind != broken:
            wanted.append(("compare", "sample", "fp8", kind, "engine"))
    wanted.append(("side_by_side", "sample", "fp8", [kind for kind in KINDS if kind != broken]))
    if broken != "tensorrt":
        wanted.append(("serve", script.engine_path("sample", "fp8", "tensorrt"), "engine"))
    assert calls == wanted


def test_kinds_of_plans_are_built_by_their_flags_and_stand_side_by_side(
    script,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each is measured in a process, once."""
    monkeypatch.setattr(script, "WORK", tmp_path)
    commands: list[list[object]] = []

    def run(command: list[object], timeout_s: float) -> str:
        commands.append(command)
        if "--out" in command:
            step_s = 0.004 if "baked" in str(command[2]) else 0.002
            rows = [{"batch": batch, "step_s": step_s * batch} for batch in (1, 4)]
            command[-1].write_text(json.dumps({"figures": rows}))  # type: ignore[attr-defined]
        return "done"

    monkeypatch.setattr(script, "run", run)
    script.build("sample", "fp8", "tensorrt-parts", "--sm=89")
    (command,) = commands
    assert command[command.index("--backend") + 1] == "tensorrt" and "--plan-layers=4" in command
    assert command[command.index("-o") + 1] == script.engine_path("sample", "fp8", "tensorrt-parts")
    table = script.side_by_side("sample", "fp8", list(KINDS)).splitlines()
    assert table[0] == "| ms a step, of sequences | 1 | 4 |" and len(table) == 5
    assert "| tensorrt-parts | 2.00 | 8.00 |" in table and "| tensorrt-baked | 4.00 |" in table[4]
    assert script.side_by_side("sample", "fp8", list(KINDS)).splitlines() == table
    assert len(commands) == 1 + len(KINDS)


def test_the_bandwidth_counts_what_a_step_reads(
    script,  # type: ignore[no-untyped-def]
    make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(quant="int4", until="compile")
    tensors = load_file(engine / "rank0.safetensors")
    wanted = sum(t.nbytes for name, t in tensors.items() if "vocab_embedding" not in name)
    assert script.weight_bytes(engine) == wanted
    monkeypatch.setattr(script, "run", lambda *_: f"noise\n{4 * wanted / 0.002}\n")
    assert script.bandwidth(engine, 0.002).startswith("A sequence alone takes 2.00 ms a token")
    assert " 25% of the " in script.bandwidth(engine, 0.002)

"""Check this GPU machine, all of it, with one command and no arguments; write a report.

Looks at the machine (`enginehouse-build doctor`), then for the sample model and a random one of a
billion parameters, each in FP8 and INT4: builds the engine, compares its greedy answers with the
CPU backend's, measures tokens per second and time to the first token, and serves it under load.
With TensorRT-LLM the engines are compiled; without, the torch backend runs on CUDA. Where
TensorRT-RTX is installed it is asked whether it takes this GPU at all, and if it has a target for
it the same models run as TensorRT plans, with the share of the memory bandwidth that one sequence
reaches: whole, in parts of four layers, and with their weights as constants, side by side. A step
that fails is a line of the report and stops nothing but what needs it. The report is
docs/gpu/<date>-<gpu>.md; exit status 1 when a step failed, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.binding import installed_version, record_machine
from enginehouse.runtime.tensorrt.package import RTX_SMS, find_package

ROOT = Path(__file__).resolve().parents[1]
PROBE, MEASURE = ROOT / "scripts" / "gpu_probe.py", ROOT / "scripts" / "gpu_measure.py"
WORK = ROOT / ".cache" / "gpu_check"
BIN = Path(sys.executable).parent
MODELS = {"sample": None, "random-1b": WORK / "random-1b"}
QUANTS = ("fp8", "int4_awq")
RANDOM_1B = {"hidden": 2048, "layers": 16, "heads": 32, "kv-heads": 8, "intermediate": 8192}
# TensorRT plans, as engines are called by them: whole and fed with their weights, which are served,
# and what is to be compared with that.
PLANS = {
    "tensorrt": (),
    "tensorrt-parts": ("--plan-layers=4",),
    "tensorrt-baked": ("--bake-weights",),
}
BUILD_S, RUN_S, READY_S = 7200, 1800, 1200
_MAX_LINES = 80  # of a failed program's output, in the report


class StepFailed(Exception):
    """A step did not do what it is for: one sentence, and what its program printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass
class Report:
    """What has been found: sections of text in order, and each step's outcome."""

    machine: dict[str, str | None]
    backend: str
    dry_run: bool = False
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def step(self, name: str, work: Callable[[], str]) -> bool:
        """Run one step; its text becomes a section. False when it failed."""
        print(f"== {name}", flush=True)
        if self.dry_run:
            return True
        began_s = time.monotonic()
        try:
            text, failure = work(), None
        except (StepFailed, EnginehouseError, OSError, subprocess.SubprocessError) as error:
            failure = f"{type(error).__name__}: {error}"
            tail = getattr(error, "output", None) or ""  # others have None, or bytes
            text = fenced("\n".join(str(tail).splitlines()[-_MAX_LINES:])) if tail else ""
        outcome = f"failed: {failure}" if failure else f"ok, {time.monotonic() - began_s:.0f} s"
        print(f"   {outcome}", flush=True)
        self.outcomes.append((name, outcome))
        if text:
            self.sections.append(f"## {name}\n\n{text.strip()}\n")
        return failure is None

    @property
    def failed(self) -> list[str]:
        return [name for name, outcome in self.outcomes if outcome.startswith("failed")]

    def text(self) -> str:
        facts = {**self.machine, "backend": self.backend, "python": platform.python_version()}
        facts["enginehouse"] = installed_version("enginehouse")
        facts["torch"] = installed_version("torch")
        lines = [f"# {self.machine['gpu']}, {date.today().isoformat()}", ""]
        lines += ["Written by `scripts/gpu_check.py`.", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value or 'none'} |" for key, value in facts.items()]
        lines += ["", "| step | outcome |", "| --- | --- |"]
        lines += [
            f"| {name} | {outcome.replace('|', '/').splitlines()[0]} |"
            for name, outcome in self.outcomes
        ]
        return "\n".join([*lines, "", *self.sections])

    def path(self) -> Path:
        gpu = re.sub(r"[^a-z0-9]+", "-", (self.machine["gpu"] or "no-gpu").lower()).strip("-")
        return ROOT / "docs" / "gpu" / f"{date.today().isoformat()}-{gpu}.md"


def run(command: list[str | Path], timeout_s: float, **environment: str) -> str:
    """A child's standard output; StepFailed with its last line when it fails or takes too long.

    It leads its own process group, which is killed when it does not end.
    """
    print(f"   {shlex.join(map(str, command))}", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        message = f"not done in {timeout_s:.0f} s; it said last: {last(output)}"
        raise StepFailed(message, output) from None
    if process.returncode:
        raise StepFailed(f"exit status {process.returncode}: {last(output)}", output)
    return output


def last(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "nothing"


def doctor() -> str:
    """The doctor's table. It says itself what is wrong, so its exit status fails the step."""
    return fenced(run([BIN / "enginehouse-build", "doctor"], 300))


def make_random_1b() -> str:
    """A Llama of 0.97 billion random parameters: its answers mean nothing, its speed does."""
    path = MODELS["random-1b"]
    assert path is not None, "it has a folder"
    if not (path / "model.safetensors").exists():
        sizes = [word for key, value in RANDOM_1B.items() for word in (f"--{key}", str(value))]
        run([sys.executable, ROOT / "scripts" / "tiny_checkpoint.py", path, *sizes], BUILD_S)
    return ""


def engine_path(model: str, quant: str, kind: str) -> Path:
    return WORK / "engines" / f"{model}-{quant}-{kind}"


def build(model: str, quant: str, kind: str, *flags: str) -> str:
    """kind: a backend, or of PLANS."""
    source, backend = MODELS[model], "tensorrt" if kind in PLANS else kind
    command: list[str | Path] = [BIN / "enginehouse-build", *([source] if source else [])]
    command += ["--quant", quant, "--backend", backend, "--max-batch-size", "64"]
    command += ["-o", engine_path(model, quant, kind), *PLANS.get(kind, ()), *flags]
    if backend in ("torch", "tensorrt"):
        command += ["--until", "compile"]
    return fenced(last(run(command, BUILD_S)))


@cache
def measure_apart(engine: Path, device: str) -> dict[str, Any]:
    """What `gpu_measure.py` finds, once in a run: in a process of its own, so that an engine that
    crashes takes nothing along.
    """
    out = WORK / "measured.json"
    out.unlink(missing_ok=True)
    run([sys.executable, MEASURE, engine, "--device", device, "--out", out], RUN_S)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def compare(model: str, quant: str, kind: str, device: str) -> str:
    """The GPU's answers beside the CPU's, token by token, and how fast they came; of TensorRT
    plans also how much of the memory's bandwidth a sequence alone reaches.

    Fails when fewer than half of the first four tokens agree: rounding parts answers late, a
    wrong layout parts them at once.
    """
    found = measure_apart(engine_path(model, quant, kind), device)
    wanted = measure_apart(engine_path(model, quant, "torch"), "cpu")["answers"]
    equal = [common(a, b) for a, b in zip(found["answers"], wanted, strict=True)]
    early = sum(min(count, 4) for count in equal) / (4 * len(equal))
    lines = ["| sequences | tokens/s | first token, s |", "| --- | --- | --- |"]
    lines += [
        f"| {row['batch']} | {row['tokens_per_s']:.0f} | {row['first_s']:.3f} |"
        for row in found["figures"]
    ]
    agreement = "Greedy tokens equal to the CPU backend's before the first that differs"
    lines += ["", f"{agreement}, of {len(wanted[0])}: {', '.join(map(str, equal))}."]
    if early < 0.5:
        raise StepFailed(f"the answers differ from the CPU's at once: {equal} equal tokens")
    if kind in PLANS:
        step_s = found["figures"][0]["step_s"]
        lines += ["", bandwidth(engine_path(model, quant, kind), step_s)]
    return "\n".join(lines)


def side_by_side(model: str, quant: str, kinds: list[str]) -> str:
    """What a decode step takes with each kind of plans, ms, by the number of sequences."""
    figures = {
        kind: measure_apart(engine_path(model, quant, kind), "engine")["figures"] for kind in kinds
    }
    batches = [row["batch"] for row in figures[kinds[0]]]
    lines = [f"| ms a step, of sequences | {' | '.join(map(str, batches))} |"]
    lines.append("| --- " * (1 + len(batches)) + "|")
    for kind, rows in figures.items():
        times = [f"{1e3 * row['step_s']:.2f}" for row in rows]
        lines.append(f"| {kind} | {' | '.join(times)} |")
    return "\n".join(lines)


def bandwidth(engine: Path, step_s: float) -> str:
    """What a decode step of one sequence reads in a second, beside what a copy on the GPU does."""
    read = weight_bytes(engine) / step_s
    copied = float(last(run([sys.executable, PROBE, "copy"], RUN_S)))
    return (
        f"A sequence alone takes {1e3 * step_s:.2f} ms a token and so reads its weights at "
        f"{read / 1e9:.0f} GB/s, {read / copied:.0%} of the {copied / 1e9:.0f} GB/s that a copy "
        "within the GPU's memory reads and writes."
    )


def weight_bytes(engine: Path) -> int:
    """Bytes of the first rank's tensors that every step reads: all but the embedding's table."""
    with (engine / "rank0.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["transformer.vocab_embedding.weight"]
    header.pop("__metadata__", None)
    return sum(end - start for start, end in (entry["data_offsets"] for entry in header.values()))


def ask_tensorrt() -> str:
    """What TensorRT-RTX says of this GPU, whatever it is: of a small plan for all of its targets,
    and for the current GPU. In a process of its own; fails when it does not end well.
    """
    return fenced(run([sys.executable, PROBE, "tensorrt"], RUN_S))


def common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def serve(engine: Path, device: str) -> str:
    """gunicorn over the engine, and `enginehouse bench` against it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = WORK / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [BIN / "gunicorn", "-c", ROOT / "configs" / "gunicorn.conf.py"]
            + ["enginehouse.server.app:create_app()"],
            cwd=ROOT,
            env={
                **os.environ,
                "ENGINEHOUSE_ENGINE": str(engine),
                "ENGINEHOUSE_BIND": address,
                "ENGINEHOUSE_DEVICE": "" if device == "engine" else device,
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_ready(server, f"http://{address}/health/ready", log)
        bench = [sys.executable, "-m", "enginehouse.verbs.main", "bench"]
        return fenced(run([*bench, f"http://{address}"], RUN_S))
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise StepFailed(f"the server ended: {last(log.read_text())}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise StepFailed(f"the server was not ready in {READY_S} s: {last(log.read_text())}")


def fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```"


def check_all(report: Report, device: str) -> None:
    """Every step, in order; what needs a failed one is left out and said to be."""
    report.step("doctor", doctor)
    made = {"sample": True, "random-1b": report.step("random model", make_random_1b)}
    backend = report.backend
    for model in MODELS:
        for quant in QUANTS:
            title = f"{model} {quant}"
            if not made[model]:
                report.outcomes.append((title, "left out: there is no checkpoint"))
                continue
            built = report.step(
                f"{title}: CPU engine", lambda m=model, q=quant: build(m, q, "torch")
            )
            if backend != "torch":
                work = lambda m=model, q=quant: build(m, q, backend)  # noqa: E731
                built = report.step(f"{title}: compile", work) and built
            if not built:
                report.outcomes.append((f"{title}: run", "left out: it was not built"))
                continue
            work = lambda m=model, q=quant: compare(m, q, backend, device)  # noqa: E731
            report.step(f"{title}: compare and measure", work)
            path = engine_path(model, quant, backend)
            report.step(f"{title}: serve", lambda path=path: serve(path, device))


def check_tensorrt(report: Report) -> None:
    """The engines again as TensorRT plans, if TensorRT-RTX is installed and has such a target."""
    if not report.dry_run and find_package("tensorrt_rtx") is None:
        report.outcomes.append(("TensorRT-RTX", "left out: it is not installed"))
        return
    report.step("TensorRT-RTX: what it says of this GPU", ask_tensorrt)
    sm = report.machine["sm"]
    if not report.dry_run and (sm is None or int(sm) not in RTX_SMS):
        report.outcomes.append(("TensorRT plans", f"left out: TensorRT-RTX has no target SM{sm}"))
        return
    for model in MODELS:
        for quant in QUANTS:
            check_plans(report, model, quant, f"--sm={sm}")


def check_plans(report: Report, model: str, quant: str, target: str) -> None:
    """Each kind of plans by itself, then side by side those that ran; the first kind is served."""
    title, ran = f"{model} {quant}: TensorRT", []
    for kind in PLANS:
        work = lambda kind=kind: build(model, quant, kind, target)  # noqa: E731
        if not report.step(f"{title} plans, {kind}", work):
            continue
        work = lambda kind=kind: compare(model, quant, kind, "engine")  # noqa: E731
        if report.step(f"{title}, compare and measure {kind}", work):
            ran.append(kind)
    if len(ran) > 1:
        report.step(f"{title}, side by side", lambda: side_by_side(model, quant, ran))
    if "tensorrt" in ran:
        path = engine_path(model, quant, "tensorrt")
        report.step(f"{title}, serve", lambda: serve(path, "engine"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="print the steps only")
    args = parser.parse_args()
    machine = record_machine()
    compiled = machine["tensorrt_llm"] is not None or args.dry_run
    report = Report(machine, "tensorrt_llm" if compiled else "torch", dry_run=args.dry_run)
    if machine["gpu"] is None and not args.dry_run:
        print("gpu_check: nvidia-smi shows no GPU; run it on a GPU machine", file=sys.stderr)
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    check_all(report, "engine" if compiled else "cuda")
    check_tensorrt(report)
    if args.dry_run:
        print("== without TensorRT-LLM: no compile; the torch backend runs with device cuda")
        print(f"== report: {report.path().relative_to(ROOT)}")
        return 0
    report.path().parent.mkdir(parents=True, exist_ok=True)
    report.path().write_text(report.text(), encoding="utf-8")
    print(f"{report.path()}: {len(report.failed)} of {len(report.outcomes)} steps failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

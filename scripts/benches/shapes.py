"""A second shape: a checkpoint of 1B random weights, built in each form, and how fast each runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benches import recipes
from benches.arithmetics import engine_in
from benches.contender import Contender, ContenderFailed
from benches.goals import number
from benches.prompts import Prompts

FORMS = ("int4", "int8", "fp8", "fp8_rowwise", "w4a8_awq", "none")
LOADS = (1, 8, 32)
_1B = dict(
    hidden=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    intermediate=8192,
    vocab=32768,
    max_positions=4096,
    tied=True,
)
_PROMPT, _OUT = 100, 32
_BUILD_S = 1800


class Row(NamedTuple):
    """rates: tokens/s by load. refusal: why there are none."""

    form: str
    who: str
    rates: dict[int, float]
    refusal: str = ""


def make_checkpoint(folder: Path) -> Path:
    """Made once; 2 GB."""
    path = folder / "random-1b"
    if not (path / "tokenizer.json").exists():
        from tiny_checkpoint import write_tiny_checkpoint

        write_tiny_checkpoint(path, **_1B)  # type: ignore[arg-type]
    return path


def measure_shapes(
    folder: Path, arithmetics: Sequence[str], forms: Sequence[str] = FORMS
) -> Iterator[Row]:
    checkpoint = make_checkpoint(folder)
    for form in forms:
        engine = folder / f"random-1b-{form}"
        refusal = _build(checkpoint, engine, form)
        if refusal:
            yield Row(form, "", {}, refusal)
            continue
        prompts = Prompts(engine, "random-1b")
        for arithmetic in arithmetics:
            packed = engine_in(engine, arithmetic, folder)
            try:
                yield Row(form, arithmetic, _rates(packed, arithmetic, prompts, folder))
            except ContenderFailed as error:
                yield Row(form, arithmetic, {}, str(error))


def _rates(engine: Path, arithmetic: str, prompts: Prompts, folder: Path) -> dict[int, float]:
    rates = {}
    with Contender(recipes.in_process(engine, arithmetic), folder / f"{engine.name}.log") as one:
        for load in LOADS:
            told = one.ask("run", prompts=prompts.make(load, _PROMPT), tokens=_OUT)
            rates[load] = load * _OUT / told["wall_s"]
    return rates


def _build(checkpoint: Path, engine: Path, form: str) -> str:
    """Build it, or find it built; why it cannot be, in a sentence."""
    command = [sys.executable, "-m", "enginehouse.verbs.main", "build", str(checkpoint)]
    command += ["-o", str(engine), "--quant", form, "--backend", "cpu", "--until", "compile"]
    command += ["--calib-samples", "1", "--calib-length", "64"]  # random weights learn nothing
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_BUILD_S, env=dict(os.environ)
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def shape_rows(rows: Sequence[Row]) -> list[list[str]]:
    table = [["1B, form", "activations", *(f"{load} at once, tokens/s" for load in LOADS)]]
    for form, who, rates, refusal in rows:
        cells = [number(rates[load]) if load in rates else "-" for load in LOADS]
        table.append([form, refusal or who, *cells])
    return table

"""An engine broken on purpose is flagged by the check named for it; the same engine is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.regress.findings import Status, Verdict
from enginehouse.regress.limits import load_limits
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.recording import write_recording
from enginehouse.regress.run import Plan, record, run
from enginehouse.regress.suite.long_texts import ledger
from enginehouse.regress.suite.suite import Prompt, Suite, Text
from makers.broken_engines import (
    Break,
    broken_engine,
    change_json,
    change_tensor,
    change_text,
    exchange_ranks,
)
from makers.engines import SourceMaker, build_engine, write_tiny_checkpoint

# With room for positions that RoPE's scaling turns otherwise.
SUITE = Suite(
    "tiny",
    [Text("short", "prose", "The engine house stands."), Text("long", "long", ledger(12))],
    [
        Prompt("continue", prompt="In the morning the stoker", max_tokens=12),
        Prompt("ask", messages=[{"role": "user", "content": "How far is it?"}], max_tokens=12),
    ],
    [],
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"quant": "int4"},
    "fp8": {"quant": "fp8"},
    "tp2": {"quant": "none", "tp": 2},
    "rope": {"quant": "none", "rope_scaling": LLAMA3},
    "kv": {"quant": "none", "kv_cache_dtype": "int8"},
    "qk_norm": {"quant": "none", "family": "qwen3"},
}


def swap_rows(packed: torch.Tensor) -> torch.Tensor:
    packed[[3, 11]] = packed[[11, 3]]
    return packed


def one_scale(scales: torch.Tensor) -> torch.Tensor:
    scales[2, 1] *= 1.02
    return scales


def drop_rope_scaling(config: dict[str, Any]) -> None:
    config["rotary_scaling"] = None


def lose_an_end(manifest: dict[str, Any]) -> None:
    manifest["model"]["eos_token_ids"] = manifest["model"]["eos_token_ids"][:1]


MUTATIONS: dict[str, tuple[str, Break, str]] = {
    "one scale off by 2 %": (
        "fp8",
        change_tensor("weights_scaling_factor", lambda s: s * 1.02),
        "kl",
    ),
    "one group's scale off by 2 %": (
        "int4",
        change_tensor("weights_scaling_factor", one_scale),
        "kl",
    ),
    "two packed INT4 rows swapped": ("int4", change_tensor("proj.weight", swap_rows), "kl"),
    "two ranks' shards exchanged": ("tp2", exchange_ranks, "kl"),
    "RoPE scaling dropped": ("rope", change_json("config.json", drop_rope_scaling), "kl"),
    "a KV scale halved": ("kv", change_tensor("kv_cache_scaling_factor", lambda s: s / 2), "kl"),
    "q/k norm skipped in one layer": (
        "qk_norm",
        change_tensor("q_layernorm.weight", torch.ones_like),
        "kl",
    ),
    "an EOS id lost": ("int4", change_json("manifest.json", lose_an_end), "end_tokens"),
    "chat template changed by one newline": (
        "int4",
        change_text("chat_template.jinja", "<|im_end|>\\n", "<|im_end|>\\n\\n"),
        "chat_template",
    ),
}


@pytest.fixture(scope="module")
def good(
    family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """good(form): an engine for the compiled CPU backend, and its recording."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(form: str) -> tuple[Path, Path]:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            choices = dict(FORMS[form])
            family, rope = choices.pop("family", None), choices.pop("rope_scaling", None)
            source = (
                family_source(family)
                if family
                else open_checkpoint(write_tiny_checkpoint(folder / "hf", rope_scaling=rope))
            )
            engine = build_engine(
                source, folder / "engine", until="compile", backend="cpu", **choices
            )
            write_recording(record(plan(engine), lambda line: None), folder / "baseline")
            made[form] = engine, folder / "baseline"
        return made[form]

    return make


def plan(engine: Path, baseline: Path | None = None) -> Plan:
    before = None if baseline is None else str(baseline)
    return Plan(str(engine), before, SUITE, load_limits(), groups=("numerics",))


def flagged(outcome: Outcome) -> set[str]:
    return {each.check for each in outcome.findings if each.status is Status.REGRESSED}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_flagged_by_the_check_named_for_it(
    mutation: str, good: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    form, break_it, check = MUTATIONS[mutation]
    engine, baseline = good(form)
    outcome = run(plan(broken_engine(engine, tmp_path, break_it), baseline), lambda line: None)
    assert outcome.verdict is Verdict.REGRESSED and check in flagged(outcome), outcome.findings


def test_an_engine_that_is_copied_and_packed_again_passes(
    good: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    engine, baseline = good("int4")
    copy = broken_engine(engine, tmp_path, lambda path: None)
    outcome = run(plan(copy, baseline), lambda line: None)
    assert outcome.verdict is Verdict.PASSED, outcome.findings
    shutil.rmtree(copy)

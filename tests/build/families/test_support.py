"""The table of families: one row each, as the plans of the same models say."""

from __future__ import annotations

import runpy
from dataclasses import fields

import pytest

from enginehouse.build.families.architectures import ARCHITECTURES
from enginehouse.build.hf_keys.support import NOTES, support
from enginehouse.runtime.checkpoint.traits import Traits
from enginehouse.verbs.main import main
from makers.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "family_table.py"))


def test_every_family_has_a_row_and_no_other() -> None:
    assert [row.architecture for row in support()] == [*ARCHITECTURES] == [*NOTES]


def test_the_page_is_as_the_table_is_now() -> None:
    text = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert SCRIPT["filled"](text) == text, "run scripts/family_table.py"


def test_what_tensorrt_does_not_do_is_said_in_its_words() -> None:
    beyond = {row.architecture: row.tensorrt for row in support()}
    for name in ("Llama", "Mixtral", "DeciLM", "GptOss", "Llama4", "DeepseekV3"):
        assert beyond[f"{name}ForCausalLM"] is None
    assert beyond["Qwen3_5ForCausalLM"] == "linear attention"
    assert beyond["Gemma3nForCausalLM"] == "layers that read the keys of others"
    assert beyond["Gemma4ForCausalLM"] == "heads of several sizes"


def test_the_page_has_every_trait() -> None:
    text = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert [f.name for f in fields(Traits) if f"`{f.name}`" not in text] == []


def test_the_verb_prints_them_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARCHITECTURES)

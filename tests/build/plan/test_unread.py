"""Tensors that nothing reads: refused by name, unless they do nothing or are told to be ignored."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.build import cli
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.unread import check_unread
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import CheckpointError
from makers.engines import build_engine, write_tiny_checkpoint
from makers.family_models import save_family

Capture = pytest.CaptureFixture[str]
HIDDEN, HEAD = 128, 32


def checkpoint_with(path: Path, *names: str) -> Path:
    """A tiny Llama that has those tensors too."""
    write_tiny_checkpoint(path)
    tensors = load_file(path / "model.safetensors")
    extra = {name: torch.ones(HEAD) for name in names}
    save_file({**tensors, **extra}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("name", "passes"), [("layers.5.self_attn.k_proj", True), ("layers.1.self_attn.k_more", False)]
)
def test_keys_of_layers_that_read_those_of_another_are_passed_over(
    tmp_path: Path, name: str, passes: bool
) -> None:
    """As released Gemmas have them all the same."""
    path = save_family("gemma4-small", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.{name}.weight"] = torch.ones(HEAD)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    source = resolve_source(str(path), path)
    config = model_config(source.config, "auto")
    with nullcontext() if passes else pytest.raises(CheckpointError, match="read by nothing"):
        check_unread(source.tensors, config, None)


@pytest.mark.parametrize(
    ("name", "why", "pattern"),
    [
        (
            "model.layers.0.self_attn.q_norm.weight",
            "no LlamaForCausalLM has such a part",
            "model.layers.*.self_attn.q_norm.weight",
        ),
        ("lm_head.bias", "a bias that config.json does not announce", "lm_head.bias"),
        (
            "model.layers.1.self_attn.q_proj.bias",
            "a bias that config.json does not announce (attention_bias, mlp_bias)",
            "model.layers.*.self_attn.q_proj.bias",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "it belongs to an adapter; merge",
            "base_model.model.model.layers.*.self_attn.q_proj.lora_A.weight",
        ),
        ("mtp.layers.0.eh_proj.weight", "no LlamaForCausalLM has", "mtp.layers.0.eh_proj.weight"),
        (
            "model.layers.2.input_layernorm.weight",
            "config.json has num_hidden_layers=2",
            "model.layers.*.input_layernorm.weight",
        ),
    ],
)
def test_what_nothing_reads_is_refused_or_ignored_by_name(
    tmp_path: Path, capsys: Capture, name: str, why: str, pattern: str
) -> None:
    path = checkpoint_with(tmp_path / "m", name)
    for flags in (["--plan"], ["-o", str(tmp_path / "e"), "--quant", "int4"]):
        assert cli.main([str(path), *flags, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"tensor {name} would be read by nothing" in error
        assert why in error and f"--ignore-tensors '{pattern}'" in error
    words = [str(path), "-o", str(tmp_path / "e"), "--until", "convert", "--quiet"]
    assert cli.main([*words, "--ignore-tensors", f"lm_head.x*, {pattern}"]) == 2
    assert "ignore_tensors has 'lm_head.x*', which is the name of no" in capsys.readouterr().err
    assert cli.main([*words, "--ignore-tensors", pattern]) == 0
    plain = build_engine(
        resolve_source(str(write_tiny_checkpoint(tmp_path / "p")), tmp_path),
        tmp_path / "plain",
        until="convert",
    )
    rank = "rank0.safetensors"
    assert (tmp_path / "e" / rank).read_bytes() == (plain / rank).read_bytes()


def test_several_are_counted(tmp_path: Path, capsys: Capture) -> None:
    names = [f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(2) for n in "qk"]
    assert cli.main([str(checkpoint_with(tmp_path / "m", *names)), "--plan"]) == 2
    assert "layers.0.self_attn.k_norm.weight and 3 more would be" in capsys.readouterr().err


def test_what_does_nothing_is_passed_over(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    source = resolve_source(str(checkpoint_with(tmp_path / "m", *names)), tmp_path)
    build_engine(source, tmp_path / "e", until="convert")


def test_ignoring_is_no_choice_about_the_engine(tmp_path: Path) -> None:
    source = resolve_source(str(checkpoint_with(tmp_path / "m", "mtp.x.weight")), tmp_path)
    engine = build_engine(source, tmp_path / "e", until="compile", ignore_tensors="mtp.*")
    assert "ignore_tensors" not in read_engine(engine).manifest.choices
    assert json.loads((engine / "config.json").read_text())["num_hidden_layers"] == 2

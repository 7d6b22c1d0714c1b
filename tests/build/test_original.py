"""Verification against transformers' own loading, of all of the model or of nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.build.original import original_logits
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import EngineError, PlanError
from makers.engines import build_engine, write_tiny_checkpoint
from makers.family_models import save_family
from makers.gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {
    **{"quant": "none", "dtype": "float32", "compute_dtype": "float32"},
    "verify_with": "transformers",
}


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path.parent)


@pytest.mark.parametrize(
    "family",
    ["llama", "phi3-longrope", "gemma3", "cohere2", "glm4", "olmo3", "qwen3-moe", "deepseek-v3"],
)
def test_a_family_is_what_transformers_loads(tmp_path: Path, family: str) -> None:
    engine = build_engine(opened(save_family(family, tmp_path / "m")), tmp_path / "e", **EXACT)
    assert read_engine(engine).manifest.verify["mean_kl"] < 1e-6


def edited(path: Path, **changes: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


ODDITIES = {
    "swish": lambda path: edited(save_family("llama", path), hidden_act="swish"),
    "no window": lambda path: edited(save_family("mistral", path), sliding_window=None),
    "a window of 0": lambda path: edited(save_family("qwen2", path), sliding_window=0),
}


@pytest.mark.parametrize("odd", ODDITIES)
def test_so_is_every_oddity(tmp_path: Path, odd: str) -> None:
    engine = build_engine(opened(ODDITIES[odd](tmp_path / "m")), tmp_path / "e", **EXACT)
    assert read_engine(engine).manifest.verify["mean_kl"] < 1e-6


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_a_gguf_file_is_what_transformers_reads_from_it(
    tmp_path: Path, tiny_source: SourceCheckpoint, kind: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_source, gguf.GGMLQuantizationType[kind])
    engine = build_engine(opened(path), tmp_path / "e", **EXACT)
    assert read_engine(engine).manifest.verify["mean_kl"] < 1e-6


def test_a_model_that_is_not_whole_is_no_truth(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match="transformers finds no model.norm.weight in .*at random"):
        original_logits(source := opened(path), torch.tensor([1, 2]))
    (path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="transformers cannot load .* to verify with: "):
        original_logits(source, torch.tensor([1, 2]))


def test_what_cannot_be_loaded_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    cut = build_engine(opened(path), tmp_path / "cut", until="convert")
    with pytest.raises(PlanError, match="has no original to load: .* is a TensorRT-LLM checkpoint"):
        build_engine(opened(cut), tmp_path / "e", verify_with="transformers", tokenizer=str(path))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    with pytest.raises(PlanError, match=r"in float32, 0\.0 GiB; 0\.0 GiB are free: leave"):
        build_engine(opened(path), tmp_path / "e", verify_with="transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="needs transformers, which is not installed: pip install"):
        build_engine(opened(path), tmp_path / "e", verify_with="transformers")
    assert not (tmp_path / "e").exists()

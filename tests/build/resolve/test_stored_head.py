"""A head beside `tie_word_embeddings: true`: kept where it differs, as transformers keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.build.resolve import resolve
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import EngineError
from makers.engines import build_engine, write_tiny_checkpoint
from makers.family_models import save_family
from makers.quantized_writers import write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {
    **{"quant": "none", "dtype": "float32", "compute_dtype": "float32"},
    "verify_with": "transformers",
}


def tie(path: Path, head: Callable[[torch.Tensor], torch.Tensor] | None) -> Path:
    """A checkpoint that says it is tied, with such a head made of its embedding stored beside."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(path / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"]).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def other(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.flip(0) * 1.5


def opened(path: Path) -> SourceCheckpoint:
    return resolve_source(str(path), path.parent)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2-tied", "gemma2", "cohere", "mixtral", "gpt-oss"]
)
def test_a_family_keeps_it_and_answers_as_transformers_does(tmp_path: Path, family: str) -> None:
    source = opened(tie(save_family(family, tmp_path / family), other))
    assert source.config["tie_word_embeddings"] is False and "is kept" in source.remarks[0]
    engine = build_engine(source, tmp_path / "engine", **EXACT)
    assert read_engine(engine).manifest.verify["mean_kl"] < 1e-6


def test_without_it_verification_against_transformers_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tie(save_family("llama", tmp_path / "llama"), other)
    monkeypatch.setattr(resolve, "with_stored_head", lambda source: source)
    build_engine(opened(path), tmp_path / "own", **{**EXACT, "verify_with": "reference"})
    with pytest.raises(EngineError, match="mean KL divergence"):
        build_engine(opened(path), tmp_path / "engine", **EXACT)


@pytest.mark.parametrize("head", [None, torch.clone])
def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path, head: Any) -> None:
    source = opened(tie(write_tiny_checkpoint(tmp_path / "m"), head))
    assert source.config["tie_word_embeddings"] is True and source.remarks == ()


def test_an_export_holds_it_and_says_that_nothing_is_tied(tmp_path: Path) -> None:
    path = tie(write_tiny_checkpoint(tmp_path / "m"), other)
    out = build_engine(opened(path), tmp_path / "hf", format="hf", quant="fp8", calib_samples=1)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored, tensors = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    head = stored["lm_head.weight"].to(tensors["lm_head.weight"].dtype)
    assert torch.equal(tensors["lm_head.weight"], head)


def test_a_quantised_checkpoint_keeps_it(tmp_path: Path) -> None:
    pair = write_quantized("awq", tmp_path)
    source = opened(tie(pair.quantized, other))
    assert source.quantized is not None and source.config["tie_word_embeddings"] is False
    engine = build_engine(source, tmp_path / "e", until="convert")
    stored = load_file(pair.quantized / "model.safetensors")["lm_head.weight"]
    found = load_file(engine / "rank0.safetensors")["lm_head.weight"]
    assert torch.equal(found, stored.to(found.dtype))


@pytest.mark.parametrize("said", [True, False])
def test_a_multimodal_gemma_is_tied_as_the_whole_says(tmp_path: Path, said: bool) -> None:
    path = save_family("gemma3", tmp_path / "m")
    text = json.loads((path / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    text.pop("tie_word_embeddings")
    (path / "config.json").write_text(json.dumps({**outer, "tie_word_embeddings": said}))
    assert opened(path).config["tie_word_embeddings"] is said

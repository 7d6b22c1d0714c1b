"""What the user named as a model -> a source checkpoint on this disk.

The sample model, a directory, a .gguf file, or a hub id. This file knows no tensor.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from enginehouse.build.resolve.hub import INSTEAD, Progress, fetch
from enginehouse.build.resolve.sample import open_sample
from enginehouse.build.resolve.stored_head import with_stored_head
from enginehouse.build.resolve.text_part import text_part
from enginehouse.build.resolve.zero_biases import with_zero_biases
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.gguf_checkpoint import open_gguf
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.sources.quantized_source import open_quantized
from enginehouse.build.sources.trtllm_checkpoint import is_trtllm_checkpoint, open_trtllm
from enginehouse.runtime.errors import CheckpointError


def _silent(line: str) -> None:
    pass


def resolve_source(
    model: str | None, cache_dir: Path, progress: Progress = _silent
) -> SourceCheckpoint:
    """Open the checkpoint that `model` names; None is the sample model, kept in cache_dir.

    Raises CheckpointError when there is no such thing, or it cannot be fetched.
    """
    if model is None:
        return open_sample(cache_dir / "sample", progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return open_gguf(path)
        raise CheckpointError(
            f"{model} is a file but no .gguf; give its directory (with config.json) instead"
        )
    looks_local = path.suffix.lower() == ".gguf" or model.startswith((".", "/", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"{model} does not exist, and is no hub id (owner/name); {INSTEAD}")
    return replace(_open_directory(fetch(model, progress)), name=model.rpartition("/")[2])


def _open_directory(path: Path) -> SourceCheckpoint:
    """A Hugging Face directory, quantised or not, or a TensorRT-LLM checkpoint folder."""
    if is_trtllm_checkpoint(path):
        return open_trtllm(path)
    source = with_zero_biases(text_part(open_checkpoint(path)))
    return open_quantized(with_stored_head(source))

"""What the user named as a model -> a source checkpoint on this disk, or on a hub.

The sample model, a directory, a .gguf file, or a hub id. This file knows no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from enginehouse.build.gguf.checkpoint import open_gguf
from enginehouse.build.hf_keys.hf_config import family_name
from enginehouse.build.resolve.hub import INSTEAD, HubFolder, Progress, open_hub
from enginehouse.build.resolve.open_quantized import open_quantized
from enginehouse.build.resolve.sample import open_sample
from enginehouse.build.resolve.stored_head import with_stored_head
from enginehouse.build.resolve.text_part import text_part
from enginehouse.build.resolve.zero_biases import with_zero_biases
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.folder import DiskFolder, Folder
from enginehouse.build.sources.hf_checkpoint import open_checkpoint, with_differing_copies
from enginehouse.build.sources.trtllm_checkpoint import is_trtllm_checkpoint, open_trtllm
from enginehouse.runtime.errors import CheckpointError


def _silent(line: str) -> None:
    pass


def resolve_source(
    model: str | None,
    cache_dir: Path,
    progress: Progress = _silent,
    dequantize: bool | None = False,
) -> SourceCheckpoint:
    """Open the checkpoint that `model` names; None is the sample model, kept in cache_dir.

    dequantize: the weights that a quantised Hugging Face checkpoint means, instead of those that
    it holds; None: of one that is quantised. Of a hub's, `owner/name` or `owner/name@revision`,
    the weight files may still be there.
    Raises CheckpointError when there is no such thing, or it cannot be fetched.
    """
    if model is None or model.lower().endswith(".gguf"):
        _refuse_dequantize(dequantize, model or "the sample model", "is always dequantised")
    if model is None:
        return open_sample(cache_dir / "sample", progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(DiskFolder(path), dequantize)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return open_gguf(path)
        raise CheckpointError(
            f"{model} is a file but no .gguf; give its directory (with config.json) instead"
        )
    looks_local = path.suffix.lower() == ".gguf" or model.startswith((".", "/", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        raise CheckpointError(f"{model} does not exist, and is no hub id (owner/name); {INSTEAD}")
    folder = open_hub(model, progress)
    source = _open_folder(folder, dequantize)
    if isinstance(folder, HubFolder):
        return replace(source, remote=_Remote(folder, source, dequantize))
    return source


class _Remote:
    """The weights of a source on the hub. What is found in them whole is what was found before."""

    def __init__(
        self, folder: HubFolder, source: SourceCheckpoint, dequantize: bool | None
    ) -> None:
        self._folder, self._source, self._dequantize = folder, source, dequantize

    def size(self, path: Path) -> int:
        return self._folder.size(path)

    def fetch(self, paths: Sequence[Path], advance: Callable[[int], None]) -> None:
        self._folder.fetch(paths, advance)
        if _open_folder(self._folder, self._dequantize).config != self._source.config:
            raise CheckpointError(
                f"{self._source.origin} holds other weights than a few of their rows said: start "
                "the build again, which has them here now"
            )


def _refuse_dequantize(dequantize: bool | None, name: str, why: str) -> None:
    if dequantize:
        raise CheckpointError(f"{name} {why}: leave dequantize out")


def _open_folder(folder: Folder, dequantize: bool | None) -> SourceCheckpoint:
    """A Hugging Face directory, quantised or not, or a TensorRT-LLM checkpoint folder."""
    if is_trtllm_checkpoint(folder.path):
        why = "is a TensorRT-LLM checkpoint, which is read in its own form only"
        _refuse_dequantize(dequantize, folder.label, why)
        return open_trtllm(folder)
    source = open_checkpoint(folder)
    family_name(text_part(source).config)  # an unknown one is refused before a header is read
    source = text_part(with_differing_copies(source))
    return open_quantized(with_stored_head(with_zero_biases(source)), dequantize)

"""What a build is made from, whatever kind of file it came in: the contract of every source.

Knows no file format and no name of a tensor; who opens a source is resolve.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from enginehouse.build.forms.quantized_linear import QuantizedForm
from enginehouse.runtime.config import ModelConfig


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors, read on demand. The names are Hugging Face's."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's dtype and shape, without reading any; CheckpointError when damaged."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A fresh tensor; `rows` reads only these rows of dim 0. Safe to call from threads."""


class Remote(Protocol):
    """Who has those of a source's files that are not on this disk yet."""

    def size(self, path: Path) -> int:
        """Bytes of the file that will be at `path`."""

    def fetch(self, paths: Sequence[Path], advance: Callable[[int], None]) -> None:
        """Bring these files here; CheckpointError when they cannot be had."""


class QuantizedSource(Protocol):
    """Linears that are quantised already, kept as they are."""

    def form(self, config: ModelConfig) -> QuantizedForm:
        """The one form an engine made of them has; CheckpointError when there is none."""

    def engine_tensors(
        self, sources: Sequence[str], config: ModelConfig
    ) -> Mapping[str, torch.Tensor]:
        """{"weight": ..., "weights_scaling_factor": ...} of the linear that `sources` make."""

    def kv_scales(self, config: ModelConfig) -> Mapping[int, float]:
        """The FP8 multiplier of each layer's keys and values; empty when there are none."""


class RowSource(Protocol):
    """Tensors that are fused as an engine has them already, by what they would be made of."""

    def read_row(self, sources: Sequence[str]) -> torch.Tensor: ...


class Dequantized(NamedTuple):
    """name: of the form that the linears are stored in. modules: those it is of, with `*` for the
    numbers of layers and experts; empty where only config.json is here.
    """

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint to build from, whatever kind of file it came in.

    config is in the form of Hugging Face's config.json. files are all those whose content the
    engine depends on. has_weights is False for a config.json alone, which can be planned but
    not converted. tokenizer_writer is called through `write_tokenizer`.

    origin: `owner/name@commit` of what came from a hub. remote: of one whose weight files may
    still be there, and are `fetch`ed before one is read; headers are read without that.

    quantized: of a checkpoint whose linears are quantised already; `tensors` then gives them
    dequantised. dequantized: of one that is used as if it were not. rows: of one whose tensors are
    fused already; its config is engine_config.
    remarks: what was found in it that its user should hear of, a sentence each.
    """

    name: str
    kind: str  # "safetensors", "gguf" or "tensorrt_llm"
    path: Path
    config: dict[str, Any]
    tensors: TensorSource
    files: tuple[Path, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    license: str | None
    tokenizer_writer: Callable[[Path], list[str]]
    has_weights: bool = True
    quantized: QuantizedSource | None = None
    dequantized: Dequantized | None = None
    rows: RowSource | None = None
    engine_config: ModelConfig | None = None
    remarks: tuple[str, ...] = ()
    origin: str | None = None
    remote: Remote | None = None

    @property
    def missing(self) -> tuple[Path, ...]:
        """The files that are not on this disk yet."""
        return () if self.remote is None else tuple(p for p in self.files if not p.exists())

    def write_tokenizer(self, dest: Path) -> list[str]:
        """Write tokenizer, chat template and generation config into `dest`; return the names.

        Raises CheckpointError when the checkpoint has no tokenizer.json.
        """
        return self.tokenizer_writer(dest)

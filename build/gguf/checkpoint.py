"""A .gguf file as a source: Hugging Face's names, row order and config.

Of some families llama.cpp interleaves the rows of q and k for its rope: they are put back in
Hugging Face's order. How the file is laid out is file.py's, what each family has of its own
families.py's; this file does not know what is made of the tensors.
Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from enginehouse.build.gguf.config import hf_config
from enginehouse.build.gguf.families import FAMILIES, MIXTRAL, NAMES, GgufFamily
from enginehouse.build.gguf.file import (
    FloatArray,
    GgufFile,
    GgufTensor,
    read_gguf,
    read_rows,
)
from enginehouse.build.gguf.rope import ROPE_TENSORS
from enginehouse.build.gguf.tokenizer import (
    check_vocabulary,
    eos_token_ids,
    write_tokenizer,
)
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.runtime.errors import CheckpointError


def _hf_name(name: str, names: Mapping[str, str]) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None if unknown."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found.group(2) not in names:
        return None
    layer = f"model.layers.{found.group(1)}." if found.group(1) else ""
    return f"{layer}{names[found.group(2)]}.{found.group(3)}"


class _Part(NamedTuple):
    """A tensor of the model in one of the file's: of its rows those from `first` on."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    first: int = 0


class GgufSource:
    """The file's tensors under Hugging Face names, dequantised to float32."""

    def __init__(self, file: GgufFile, family: GgufFamily, head_dim: int) -> None:
        self._path = file.path
        self._interleaves = family.interleaves
        self._adds_one = family.adds_one
        self._head_dim = head_dim
        self._parts: dict[str, _Part] = {}
        names = {**NAMES, **family.names}
        for name, tensor in file.tensors.items():
            if (target := _hf_name(name, names)) is not None:
                self._parts[target] = _Part(tensor, tensor.shape)
            elif (target := _hf_name(name, family.experts)) is not None and len(tensor.shape) == 3:
                for expert in range(tensor.shape[0]):  # [experts, rows, columns]
                    part = _Part(tensor, tensor.shape[1:], expert * tensor.shape[1])
                    self._parts[target.format(expert)] = part
            elif name not in ROPE_TENSORS:
                raise CheckpointError(
                    f"{file.path} holds tensor {name!r}, which no plain "
                    f"{family.model_type} model has (a mixture of experts?); give its Hugging Face "
                    "directory"
                )
        self._infos = {
            name: TensorInfo(torch.float32, part.shape) for name, part in self._parts.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._parts:
            raise CheckpointError(f"{self._path} has no tensor {name!r}")
        tensor, shape, first = self._parts[name]
        if len(shape) == 1:  # one row of the file, whose elements are the rows asked for
            vector = read_rows(self._path, name, tensor, 0, 1).reshape(shape)
            if self._adds_one and name.endswith("norm.weight"):
                vector -= 1
            permuted = _unpermute(vector, self._head_dim) if self._is_permuted(name) else vector
            return torch.from_numpy(permuted[rows] if rows is not None else permuted)
        start, stop, step = (rows or slice(None)).indices(shape[0])
        assert step == 1, "rows are read in one piece"
        stop = max(start, stop)
        if not self._is_permuted(name):
            return torch.from_numpy(
                read_rows(self._path, name, tensor, first + start, first + stop)
            )
        head = self._head_dim  # rows move within a head only: read the heads they lie in
        before = start // head * head
        heads = read_rows(self._path, name, tensor, before, -(-stop // head) * head)
        return torch.from_numpy(_unpermute(heads, head)[start - before : stop - before])

    def _is_permuted(self, name: str) -> bool:
        return self._interleaves and (".q_proj." in name or ".k_proj." in name)


def _unpermute(heads: FloatArray, head_dim: int) -> FloatArray:
    """Undo llama.cpp's row order within each head: pairs (2i, 2i+1) back to (i, i + d/2)."""
    pairs = heads.reshape(-1, head_dim // 2, 2, *heads.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(heads.shape)


def open_gguf(path: Path) -> SourceCheckpoint:
    """Open a .gguf file of one of FAMILIES; no weight is read.

    Raises CheckpointError for damage, another family, and what config.json cannot express.
    """
    file = read_gguf(path)
    check_vocabulary(file)
    family = _family_of(file)
    config = hf_config(file, family)
    metadata = file.metadata
    return SourceCheckpoint(
        name=path.stem,
        kind="gguf",
        path=path,
        config=config,
        tensors=GgufSource(file, family, config["head_dim"]),
        files=(path,),
        eos_token_ids=eos_token_ids(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        license=metadata.get("general.license"),
        tokenizer_writer=partial(write_tokenizer, file),
    )


def _family_of(file: GgufFile) -> GgufFamily:
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file.path} has general.architecture {name!r}; from .gguf files only "
            f"{', '.join(FAMILIES)} are read (llama: Mistral, Mixtral and SmolLM2 too): give the "
            "model's "
            "Hugging Face directory"
        )
    if name == "llama" and file.of_model("expert_count"):
        return MIXTRAL
    return FAMILIES[name]

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


class _Made(NamedTuple):
    """A tensor of the model made of some of the file's, as families.Joined says."""

    tensors: tuple[GgufTensor, ...]
    shape: tuple[int, ...]
    turned: bool


def _made(file: GgufFile, family: GgufFamily) -> dict[str, _Made]:
    """By name; CheckpointError where the tensors that one is made of are not alike."""
    made: dict[str, _Made] = {}
    for layer in range(file.of_model("block_count") if family.joined else 0):
        for name, joined in family.joined.items():
            parts = [file.tensors.get(f"blk.{layer}.{each}") for each in joined.names]
            found = tuple(part for part in parts if part is not None)
            if len(found) < len(parts) or len({part.shape for part in found}) > 1:
                raise CheckpointError(
                    f"{file.path} has in layer {layer} no {' and '.join(joined.names)} of one "
                    "shape; download the file again"
                )
            shape = found[0].shape
            if len(shape) > 1:
                shape = (shape[0], shape[1] * len(found), *shape[2:])
            if joined.turned:
                shape = (shape[0], shape[2], shape[1])
            made[f"model.layers.{layer}.{name}"] = _Made(found, shape, joined.turned)
    return made


class GgufSource:
    """The file's tensors under Hugging Face names, dequantised to float32."""

    def __init__(self, file: GgufFile, family: GgufFamily, head_dim: int) -> None:
        self._path = file.path
        self._interleaves = family.interleaves
        self._adds_one = family.adds_one
        self._head_dim = head_dim
        self._parts: dict[str, _Part] = {}
        self._made = _made(file, family)
        names = {**NAMES, **family.names}
        in_made = {part.offset for made in self._made.values() for part in made.tensors}
        for name, tensor in file.tensors.items():
            if tensor.offset in in_made:
                continue
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
        shapes = {name: part.shape for name, part in self._parts.items()}
        shapes |= {name: made.shape for name, made in self._made.items()}
        self._infos = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def _make(self, name: str, rows: slice) -> torch.Tensor:
        """Of some experts; a vector is one row of the file."""
        tensors, shape, turned = self._made[name]
        if len(shape) == 1:
            vector = read_rows(self._path, name, tensors[0], 0, 1).reshape(shape)
            return torch.from_numpy(vector[rows])
        start, stop, _ = rows.indices(shape[0])
        stop = max(start, stop)
        read = []
        for tensor in tensors:
            num_rows = tensor.shape[1] if len(tensor.shape) == 3 else 1
            part = read_rows(self._path, name, tensor, start * num_rows, stop * num_rows)
            read.append(part.reshape(stop - start, *tensor.shape[1:]))
        joined = np.stack(read, axis=2).reshape(stop - start, -1, *tensors[0].shape[2:])
        return torch.from_numpy(joined.swapaxes(1, 2) if turned else joined).contiguous()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name in self._made:
            return self._make(name, rows or slice(None))
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

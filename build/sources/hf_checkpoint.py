"""A Hugging Face directory as a lazy source: config.json, tensors read one by one, tokenizer files.

This file does not know what the tensors mean, nor how an engine names, cuts or quantises them;
how a weight file is laid out is safetensors_file.py's.
Source: the `model.safetensors.index.json` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from enginehouse.build.families.architectures import usual_name
from enginehouse.build.hf_keys.config_values import read_json, refuse_pointers
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.build.sources.expert_names import table_parts
from enginehouse.build.sources.folder import Folder, as_folder
from enginehouse.build.sources.safetensors_file import (
    SafetensorsTensor,
    read_safetensors_header,
    read_tensor,
)
from enginehouse.build.sources.tokenizer_files import (
    copy_tokenizer,
    special_token_ids,
    tokenizer_files,
)
from enginehouse.runtime.errors import CheckpointError

_HEADERS_AT_ONCE = 8
_ROWS_FROM_AFAR = 16
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that an index names, under the names
    that the architecture's table has for them.
    """

    def __init__(self, folder: Folder, architecture: str = "") -> None:
        self._folder = folder
        self._directory = folder.path
        self._architecture = architecture

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(entry.dtype, entry.shape) for name, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, SafetensorsTensor]:
        return {
            part.name: tensor._replace(
                shape=part.shape, offset=tensor.offset + part.first * tensor.dtype.itemsize
            )
            for name, tensor in self._stored.items()
            for part in table_parts(self._architecture, name, tensor.shape)
        }

    @cached_property
    def _stored(self) -> dict[str, SafetensorsTensor]:
        if _SINGLE in self._folder.names:
            return read_safetensors_header(self._directory / _SINGLE, self._folder)
        if INDEX in self._folder.names:
            return self._indexed_entries(self._directory / INDEX)
        raise CheckpointError(
            f"{self._folder.label} holds no {_SINGLE} and no {INDEX}; download the weights beside "
            "config.json"
        )

    def _indexed_entries(self, index_path: Path) -> dict[str, SafetensorsTensor]:
        """All that the shards hold, as transformers takes it; of several copies the index's."""
        weight_map, headers = _weight_map(index_path), self._shards
        entries = {name: tensor for found in headers.values() for name, tensor in found.items()}
        absent = sorted(set(weight_map) - set(entries))
        if absent:
            raise CheckpointError(
                f"{index_path} places tensor {absent[0]!r} in {weight_map[absent[0]]}, which does "
                "not hold it; download that shard again"
            )
        placed = {name: headers[shard].get(name) for name, shard in weight_map.items()}
        return entries | {name: tensor for name, tensor in placed.items() if tensor is not None}

    @cached_property
    def _shards(self) -> dict[str, dict[str, SafetensorsTensor]]:
        """The headers of the shards that an index names."""
        index_path = self._directory / INDEX
        shards = sorted(set(_weight_map(index_path).values()))
        for shard in shards:
            if shard not in self._folder.names:
                raise CheckpointError(
                    f"{index_path} names shard {shard}, which is not in {self._folder.label}; "
                    "download the missing file"
                )
        paths = [self._directory / shard for shard in shards]
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:  # a hub takes its time for each
            headers = list(pool.map(partial(read_safetensors_header, files=self._folder), paths))
        return dict(zip(shards, headers, strict=True))

    def differing(self) -> tuple[str, ...]:
        """A sentence for each tensor of which shards hold copies that differ. Reads the copies, of
        those that are still on a hub a few rows.
        """
        if _SINGLE in self._folder.names or INDEX not in self._folder.names:
            return ()
        return tuple(
            f"{shard} and {self._stored[name].path.name} both hold {name}, and differ: the second "
            "is taken, where the index places it"
            for shard, found in self._shards.items()
            for name, tensor in found.items()
            if not _same(tensor, self._stored[name])
        )

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._entries:
            raise CheckpointError(f"{self._folder.label} has no tensor {name!r}")
        return read_tensor(self._entries[name], rows)


def open_checkpoint(where: Path | Folder) -> SourceCheckpoint:
    """Open a Hugging Face directory; no weight is read, and their headers only when asked for.

    Raises CheckpointError when config.json is missing or broken, and for pickle weights.
    """
    folder = as_folder(where)
    path = folder.path
    _refuse_foreign(folder)
    config = read_json(path / "config.json")
    weights = _weight_names(folder)
    families = config.get("architectures") or [""]
    family = usual_name(str(families[0])) if isinstance(families, list) else ""
    eos, bos = special_token_ids(path, config)
    return SourceCheckpoint(
        name=folder.name,
        kind="safetensors",
        path=path,
        config=config,
        tensors=SafetensorsSource(folder, family),
        files=(path / "config.json", *(path / name for name in weights), *tokenizer_files(path)),
        eos_token_ids=eos,
        bos_token_id=bos,
        license=_license(path / "README.md"),
        tokenizer_writer=lambda dest: copy_tokenizer(path, dest),
        has_weights=bool(weights),
        origin=folder.origin,
    )


def with_differing_copies(source: SourceCheckpoint) -> SourceCheckpoint:
    """`source`, saying of which tensors its shards hold copies that differ."""
    tensors = source.tensors
    found = tensors.differing() if isinstance(tensors, SafetensorsSource) else ()
    return replace(source, remarks=(*source.remarks, *found))


def _same(one: SafetensorsTensor, other: SafetensorsTensor) -> bool:
    """Whether two files hold the same tensor, byte for byte; only those of two files are read."""
    if one.path == other.path or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one == other
    here = one.path.exists() and other.path.exists()
    rows = None if here or not one.shape else slice(0, _ROWS_FROM_AFAR)
    first, second = (read_tensor(each, rows).reshape(-1).view(torch.uint8) for each in (one, other))
    return first.equal(second)


def _weight_names(folder: Folder) -> list[str]:
    """The files of the weights that are there; none beside a config.json alone.

    CheckpointError where pickles are all there is, or where the index names one.
    """
    if _SINGLE in folder.names:
        return [_SINGLE]
    if INDEX in folder.names:
        shards = sorted(set(_weight_map(folder.path / INDEX).values()))
        pickles = [shard for shard in shards if shard.endswith(PICKLE_SUFFIXES)]
        if not pickles:
            return [INDEX, *(shard for shard in shards if shard in folder.names)]
    else:
        pickles = sorted(name for name in folder.names if name.endswith(PICKLE_SUFFIXES))
    refuse_pointers(folder.path / name for name in pickles)
    if pickles:
        raise CheckpointError(
            f"{folder.label} holds weights only as {pickles[0]}: pickle files can run code when "
            "read, so they are refused; convert them where you trust them: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder.label}').save_pretrained('{folder.label}-safetensors')\""
        )
    return []


def _refuse_foreign(folder: Folder) -> None:
    """CheckpointError for folders of another kind, by the files that give them away."""
    path, names, label = folder.path, folder.names, folder.label
    weights = {name for name in names if name.startswith(("model", "pytorch_model", "rank"))}
    if "adapter_config.json" in names and not weights:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{label} holds a LoRA adapter alone, without its base model"
            f"{f' ({base})' if base else ''}: merge the two "
            "where peft is installed, and give the folder that comes of it: python -c "
            '"from peft import AutoPeftModelForCausalLM as M; from transformers import '
            f"AutoTokenizer as T; M.from_pretrained('{label}').merge_and_unload()"
            f".save_pretrained('{label}-merged'); T.from_pretrained('{label}')"
            f".save_pretrained('{label}-merged')\""
        )
    parts = sorted(name for name in names if name.startswith("consolidated"))
    if "config.json" not in names and "params.json" in names and parts:
        raise CheckpointError(
            f"{label} holds its maker's own format ({parts[0]}, params.json), which is not read: "
            "download config.json, model*.safetensors and tokenizer.json of the same model, which "
            "most repositories hold beside it, or convert it with transformers 4's "
            "convert_mistral_weights_to_hf.py (Meta's: convert_llama_weights_to_hf.py)"
        )


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; download the file again")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _license(readme: Path) -> str | None:
    """The `license:` line of a model card's front matter."""
    if not readme.exists():
        return None
    card = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*([\w.\-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None

"""A Hugging Face directory as a lazy source: config.json, tensors read one by one, tokenizer files.

This file does not know what the tensors mean, nor how an engine names, cuts or quantises them;
how a weight file is laid out is safetensors_file.py's.
Source: the `model.safetensors.index.json` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from enginehouse.build.families.config_values import read_json
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.build.sources.safetensors_file import (
    SafetensorsTensor,
    read_safetensors_header,
    read_tensor,
)
from enginehouse.build.sources.tokenizer_files import (
    TOKENIZER_FILES,
    copy_tokenizer,
    special_token_ids,
)
from enginehouse.runtime.errors import CheckpointError

_PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that an index names."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(entry.dtype, entry.shape) for name, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, SafetensorsTensor]:
        index_path = self._directory / "model.safetensors.index.json"
        single = self._directory / "model.safetensors"
        if single.exists() or not index_path.exists():
            if not single.exists():
                raise CheckpointError(
                    f"{self._directory} holds no model.safetensors and no "
                    "model.safetensors.index.json; download the weights beside config.json"
                )
            return read_safetensors_header(single)
        return self._indexed_entries(index_path)

    def _indexed_entries(self, index_path: Path) -> dict[str, SafetensorsTensor]:
        entries: dict[str, SafetensorsTensor] = {}
        weight_map = _weight_map(index_path)
        for shard in sorted(set(weight_map.values())):
            path = self._directory / shard
            if Path(shard).name != shard or not path.is_file():
                raise CheckpointError(
                    f"{index_path} names shard {shard}, which is not in {self._directory}; "
                    "download the missing file"
                )
            found = read_safetensors_header(path)
            stray = sorted(name for name in found if weight_map.get(name) != shard)
            if stray:
                raise CheckpointError(
                    f"{path} holds tensor {stray[0]!r}, which {index_path.name} does not place "
                    "there; the index belongs to another version: download both again"
                )
            entries.update(found)
        absent = sorted(set(weight_map) - set(entries))
        if absent:
            raise CheckpointError(
                f"{index_path} places tensor {absent[0]!r} in {weight_map[absent[0]]}, which does "
                "not hold it; download that shard again"
            )
        return entries

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._entries:
            raise CheckpointError(f"{self._directory} has no tensor {name!r}")
        return read_tensor(self._entries[name], rows)


def open_checkpoint(path: Path) -> SourceCheckpoint:
    """Open a Hugging Face directory; no weight is read, and their headers only when asked for.

    Raises CheckpointError when config.json is missing or broken, and for pickle weights.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory with a config.json; give a Hugging Face checkpoint "
            "directory, a .gguf file or a hub id"
        )
    _refuse_foreign(path)
    config = read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        weights = [path / "model.safetensors"]
    elif index.exists():
        shards = sorted(set(_weight_map(index).values()))
        weights = [index, *(path / shard for shard in shards if (path / shard).exists())]
    else:
        weights = []
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{path} holds weights only as {pickles[0]}: pickle files can run code when read, "
                "so they are refused; convert them where you trust them: python -c "
                '"from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
            )
    tokenizer_files = [path / name for name in TOKENIZER_FILES if (path / name).exists()]
    eos, bos = special_token_ids(path, config)
    return SourceCheckpoint(
        name=path.resolve().name,
        kind="safetensors",
        path=path,
        config=config,
        tensors=SafetensorsSource(path),
        files=(path / "config.json", *weights, *tokenizer_files),
        eos_token_ids=eos,
        bos_token_id=bos,
        license=_license(path / "README.md"),
        tokenizer_writer=lambda dest: copy_tokenizer(path, dest),
        has_weights=bool(weights),
    )


def _refuse_foreign(path: Path) -> None:
    """CheckpointError for folders of another kind, by the files that give them away."""
    names = {item.name for item in path.iterdir()}
    weights = {name for name in names if name.startswith(("model", "pytorch_model", "rank"))}
    if "adapter_config.json" in names and not weights:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{path} holds a LoRA adapter alone, without its base model ({base}): merge the two "
            "where peft is installed, and give the folder that comes of it: python -c "
            '"from peft import AutoPeftModelForCausalLM as M; from transformers import '
            f"AutoTokenizer as T; M.from_pretrained('{path}').merge_and_unload()"
            f".save_pretrained('{path}-merged'); T.from_pretrained('{path}')"
            f".save_pretrained('{path}-merged')\""
        )
    parts = sorted(name for name in names if name.startswith("consolidated"))
    if "config.json" not in names and "params.json" in names and parts:
        raise CheckpointError(
            f"{path} holds its maker's own format ({parts[0]}, params.json), which is not read: "
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

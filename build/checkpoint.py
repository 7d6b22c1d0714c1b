"""A Hugging Face directory as a lazy source: config.json, tensors read one by one, tokenizer files.

This file does not know what the tensors mean, nor how an engine names, cuts or quantises them;
how a weight file is laid out is safetensors_file.py's.
Source: the `model.safetensors.index.json` of transformers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from enginehouse.build.quantized_linear import QuantizedForm
from enginehouse.build.safetensors_file import (
    SafetensorsTensor,
    read_safetensors_header,
    read_tensor,
)
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Tokens that chat templates put after an assistant's turn: a model that was taught one of them
# stops with it, whether or not the files call it an end of sequence.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
)
_PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


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


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint to build from, whatever kind of file it came in.

    config is in the form of Hugging Face's config.json. files are all those whose content the
    engine depends on. has_weights is False for a config.json alone, which can be planned but
    not converted. tokenizer_writer is called through `write_tokenizer`.

    quantized: of a checkpoint whose linears are quantised already; `tensors` then gives them
    dequantised. rows: of one whose tensors are fused already; its config is engine_config.
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
    rows: RowSource | None = None
    engine_config: ModelConfig | None = None

    def write_tokenizer(self, dest: Path) -> list[str]:
        """Write tokenizer, chat template and generation config into `dest`; return the names.

        Raises CheckpointError when the checkpoint has no tokenizer.json.
        """
        return self.tokenizer_writer(dest)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file and the line at fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; it is no complete Hugging Face checkpoint: "
            "download that file too"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise CheckpointError(
            f"{path} is not JSON that anyone wrote: it is nested too deep"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}; wanted an object")
    return data


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; download the file again")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def token_ids(value: Any) -> list[int]:
    """An `eos_token_id` as it stands in JSON (absent, a number or a list) as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def end_of_turn_tokens(chat_template: str | None) -> list[str]:
    """The end-of-turn tokens that a chat template writes."""
    return [token for token in END_OF_TURN_TOKENS if chat_template and token in chat_template]


def default_chat_template(value: Any) -> str | None:
    """The template out of tokenizer_config.json's `chat_template`: a string or a named list."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    template = path / "chat_template.jinja"
    if template.exists():
        try:
            return template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{template} is not UTF-8 text: byte {error.start} is wrong"
            ) from None
    return default_chat_template(tokenizer_config.get("chat_template"))


def special_token_ids(path: Path, config: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """All ids that end a sequence, in order of authority, and the id that begins one."""
    generation, tokenizer_config = (
        read_json(path / name) if (path / name).exists() else {}
        for name in ("generation_config.json", "tokenizer_config.json")
    )
    eos = token_ids(generation.get("eos_token_id")) + token_ids(config.get("eos_token_id"))
    bos = token_ids(config.get("bos_token_id")) + token_ids(generation.get("bos_token_id"))

    words = [_token_text(tokenizer_config.get("eos_token"))]
    words += end_of_turn_tokens(_chat_template(path, tokenizer_config))
    bos_word = _token_text(tokenizer_config.get("bos_token"))
    ids = _added_token_ids(path, tokenizer_config)
    eos += [ids[word] for word in words if word in ids]
    bos += [ids[bos_word]] if bos_word in ids else []
    return tuple(dict.fromkeys(eos)), (bos[0] if bos else None)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _added_token_ids(path: Path, tokenizer_config: dict[str, Any]) -> dict[str | None, int]:
    decoder = tokenizer_config.get("added_tokens_decoder")
    name, key = "tokenizer_config.json", "added_tokens_decoder"
    try:
        if isinstance(decoder, dict):
            return {_token_text(token): int(number) for number, token in decoder.items()}
        name, key = "tokenizer.json", "added_tokens"
        added = (read_json(path / name).get(key) or []) if (path / name).exists() else []
        return {str(token["content"]): int(token["id"]) for token in added}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path / name} has {key} that are no tokens with their ids; download the file again"
        ) from None


def _license(readme: Path) -> str | None:
    """The `license:` line of a model card's front matter."""
    if not readme.exists():
        return None
    card = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*([\w.\-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def copy_tokenizer(path: Path, dest: Path) -> list[str]:
    if not (path / "tokenizer.json").exists():
        raise CheckpointError(
            f"{path} has no tokenizer.json; make one with: python -c "
            '"from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    names = [name for name in TOKENIZER_FILES if (path / name).exists()]
    for name in names:
        shutil.copyfile(path / name, dest / name)
    if "chat_template.jinja" not in names and "tokenizer_config.json" in names:
        template = _chat_template(path, read_json(path / "tokenizer_config.json"))
        if template is not None:
            (dest / "chat_template.jinja").write_text(template, encoding="utf-8")
            names.append("chat_template.jinja")
    return names

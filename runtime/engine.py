"""The engine directory: what is in it, and whether it is still what was built.

    config.json           TensorRT-LLM's: of the checkpoint, or of the compiled engine
    rankN.safetensors     one per GPU; rankN.engine when TensorRT-LLM compiled it
    decoder-N.plan        backend tensorrt: one for each context class of N tokens, for all ranks;
                          or its parts, as docs/tensorrt.md tells
    tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
    manifest.json         source, choices, versions, and the SHA-256 of every other file

Knows no tensor arithmetic: `checkpoint/weights.py` reads the rank files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_READ_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")  # of a file; nothing leads elsewhere


class FileRecord(msgspec.Struct, frozen=True):
    """One file of the directory as it was built."""

    bytes: int
    sha256: str


class ModelRecord(msgspec.Struct, frozen=True):
    """What a server tells its clients of the model. Prices: dollars per million tokens."""

    name: str
    eos_token_ids: tuple[int, ...]
    license: str | None = None
    price_input: float | None = None
    price_output: float | None = None


class Limits(msgspec.Struct, frozen=True):
    """How much the engine takes at once. max_seq_len is prompt plus output, in tokens.

    kv_cache_gib None: chosen when the engine is opened. compute_dtype: of the torch backend,
    auto | float32 | bfloat16. max_attention_window: KvCacheConfig's, one for each layer; None when
    every layer sees the whole context.
    """

    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    kv_block_size: int
    kv_cache_gib: float | None = None
    compute_dtype: str = "auto"
    max_attention_window: tuple[int, ...] | None = None


class StageRecord(msgspec.Struct, frozen=True):
    """What a stage of a build took. peak_bytes: of the process's memory, looked at now and then."""

    name: str
    seconds: float
    peak_bytes: int


class MemoryRecord(msgspec.Struct, frozen=True):
    """One GPU's memory as it was planned, bytes. requests: (context in tokens, how many fit at
    once, up to max_batch_size).
    """

    gpu: str
    total: int
    weights: int
    activations: int
    runtime: int
    kv_cache: int
    requests: tuple[tuple[int, int], ...]


class BuildRecord(msgspec.Struct, frozen=True):
    """What a build found on its way, for people; nothing is run by it.

    source_bytes: of the source's weights. errors: of each layer that was rounded, (layer, relative
    root mean square of `errors_of`); empty where nothing was.
    """

    source_bytes: int
    weight_bytes: int
    num_parameters: int
    stages: tuple[StageRecord, ...]
    memory: MemoryRecord
    errors_of: str = ""
    errors: tuple[tuple[int, float], ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    """manifest.json. `digest` names the engine: a hash over `files`."""

    format: int
    name: str
    created: str  # ISO 8601, UTC
    backend: str
    model: ModelRecord
    limits: Limits
    source: dict[str, Any]
    choices: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    digest: str
    verify: dict[str, Any] | None = None
    machine: dict[str, str | None] | None = None  # what a compiled engine is bound to
    # backend tensorrt: package, version, targets, for each context class its limits, parts and
    # their files, and what each file cost
    tensorrt: dict[str, Any] | None = None
    build: BuildRecord | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine directory whose manifest and config have been read."""

    path: Path
    config: ModelConfig
    manifest: Manifest

    def rank_file(self, rank: int) -> Path:
        return self.path / f"rank{rank}.safetensors"


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in pieces; advance(bytes) after each of them."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of each file, several at a time (hashing releases the GIL)."""
    ordered = sorted(names)
    paths = [directory / name for name in ordered]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_sha256, paths)
        return {
            name: FileRecord(path.stat().st_size, digest)
            for name, path, digest in zip(ordered, paths, digests, strict=True)
        }


def engine_digest(files: Mapping[str, FileRecord]) -> str:
    """The engine's name by content: a hash over its files' names and hashes."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return "sha256:" + sha256(lines.encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(msgspec.to_builtins(manifest), indent=2, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_config(directory: Path) -> ModelConfig:
    """config.json of a checkpoint or an engine; EngineError in one sentence."""
    path = directory / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{directory} has no config.json; wanted an engine directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build the engine again") from None
    model = data.get("pretrained_config", data) if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise EngineError(f"{path} holds no JSON object of a model; build the engine again")
    return ModelConfig.from_dict(model)  # an engine's is inside


def read_manifest(directory: Path) -> Manifest:
    """manifest.json, and whether each file is there in its size; EngineError in one sentence."""
    if not directory.is_dir():
        raise EngineError(f"{directory} is not a directory; build an engine with enginehouse-build")
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        is_model = (directory / "config.json").exists()
        first = f": build one of this model first, enginehouse build {directory}"
        raise EngineError(
            f"{directory} has no {MANIFEST}; wanted an engine directory made by enginehouse-build"
            f"{first if is_model else ''}"
        ) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build the engine again") from None
    if manifest.format != MANIFEST_FORMAT:
        raise EngineError(
            f"{path} has format {manifest.format}; this version reads {MANIFEST_FORMAT}: "
            "build the engine again"
        )
    for name, record in manifest.files.items():
        file = directory / name
        if not _NAME.fullmatch(name):
            raise EngineError(
                f"{path} names the file {name!r}; wanted names of files in its folder: "
                "build the engine again"
            )
        if not file.is_file() or file.stat().st_size != record.bytes:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise EngineError(
                f"{file}: {found}; the manifest says {record.bytes} bytes: build the engine again"
            )
    return manifest


def read_engine(directory: Path) -> Engine:
    """Open an engine directory: everything but the weights, and no hashing yet.

    Raises EngineError when it is no engine or lacks a file.
    """
    manifest = read_manifest(directory)
    if is_hf_checkpoint(manifest):
        raise EngineError(
            f"{directory} is a quantised Hugging Face checkpoint, for TensorRT-LLM's PyTorch "
            "backend, vLLM or SGLang; build an engine with format=trtllm"
        )
    config = read_config(directory)
    suffix = "engine" if manifest.backend == "tensorrt_llm" else "safetensors"
    for rank in range(config.mapping.world_size):
        if f"rank{rank}.{suffix}" not in manifest.files:
            raise EngineError(
                f"{directory / MANIFEST} lists no rank{rank}.{suffix}; build the engine again"
            )
    check_end_tokens(directory, manifest, config.vocab_size)
    return Engine(directory, config, manifest)


def check_end_tokens(directory: Path, manifest: Manifest, vocab_size: int) -> None:
    """EngineError for a token that ends an answer and that the model has not."""
    beyond = [i for i in manifest.model.eos_token_ids if not 0 <= i < vocab_size]
    if beyond:
        raise EngineError(
            f"{directory / MANIFEST} names {beyond[0]} as an end of sequence, and the model has "
            f"vocab_size={vocab_size}; build the engine again"
        )


def is_hf_checkpoint(manifest: Manifest) -> bool:
    """Whether the directory was made by `--format hf`: a checkpoint, not an engine."""
    return manifest.choices.get("format") == "hf"


def verify_files(engine: Engine) -> None:
    """Hash every file and compare with the manifest; EngineError names the first that differs."""
    verify_digests(engine.path, engine.manifest)


def verify_digests(directory: Path, manifest: Manifest) -> None:
    """`verify_files` for a directory whose config no engine has."""
    found = hash_files(directory, manifest.files)
    for name, record in manifest.files.items():
        if found[name].sha256 != record.sha256:
            raise EngineError(
                f"{directory / name}: its SHA-256 is not the manifest's; "
                "the file was changed or damaged: build the engine again"
            )

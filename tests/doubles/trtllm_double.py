"""Puts TensorRT-LLM's double on the paths, compiles engines with it, and opens them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from enginehouse.runtime.engine import (
    MANIFEST,
    Manifest,
    engine_digest,
    hash_files,
    read_engine,
    write_manifest,
)
from enginehouse.runtime.machine.binding import record_machine
from makers.paths import DOUBLES


def double_environment(*, later: bool = False) -> dict[str, str]:
    """For a child process: trtllm-build and nvidia-smi on PATH, tensorrt_llm importable."""
    paths = [str(DOUBLES / "later")] * later + [str(DOUBLES)]
    return {
        **os.environ,
        "PATH": f"{DOUBLES / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(paths),
        "DOUBLE_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }


def install_double(patch: pytest.MonkeyPatch, *, later: bool = False) -> None:
    """The same for this process, until the patch is undone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        patch.delitem(sys.modules, name)
    patch.syspath_prepend(str(DOUBLES))
    if later:
        patch.syspath_prepend(str(DOUBLES / "later"))
    for name, value in double_environment(later=later).items():
        if os.environ.get(name) != value and name != "PYTHONPATH":
            patch.setenv(name, value)


def build_arguments(checkpoint: Path, output: Path) -> list[str]:
    """A small serving engine's flags."""
    arguments = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output)]
    arguments += ["--max_batch_size", "8", "--max_num_tokens", "64"]
    return [*arguments, "--max_input_len", "2048", "--tokens_per_block", "16"]


def trtllm_build(checkpoint: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The double's trtllm-build as a program, with more flags."""
    return subprocess.run(
        [str(DOUBLES / "bin" / "trtllm-build"), *build_arguments(checkpoint, output), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=double_environment(),
    )


def compiled_engine(torch_engine: Path, output: Path, *flags: str) -> Path:
    """An engine directory for TensorRT-LLM, from a torch engine's rank files and tokenizer.

    Its manifest is the torch engine's with backend, machine and files changed.
    """
    engine = read_engine(torch_engine)
    built = trtllm_build(torch_engine, output, *flags)
    assert built.returncode == 0, built.stderr
    for name in engine.manifest.files:
        if not name.startswith("rank") and name != "config.json":
            (output / name).write_bytes((torch_engine / name).read_bytes())
    rewrite_manifest(output, engine.manifest, backend="tensorrt_llm", machine=record_machine())
    return output


def rewrite_manifest(directory: Path, manifest: Manifest, **changes: Any) -> None:
    names = [path.name for path in directory.iterdir() if path.name != MANIFEST]
    files = hash_files(directory, names)
    write_manifest(
        directory,
        msgspec.structs.replace(manifest, files=files, digest=engine_digest(files), **changes),
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

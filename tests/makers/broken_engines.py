"""Engines broken on purpose: a copy of a good one, with one thing wrong and a manifest that says
nothing of it, as a fault of the compiler's would leave it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from enginehouse.runtime.cpu.packed_file import PACKED
from enginehouse.runtime.cpu.packing import pack_engine
from enginehouse.runtime.engine import (
    Manifest,
    engine_digest,
    hash_files,
    read_config,
    read_manifest,
    write_manifest,
)

Break = Callable[[Path], None]


def broken_engine(engine: Path, folder: Path, break_it: Break) -> Path:
    """A copy in `folder`, broken, packed again, and with the digests of what it now holds."""
    copy = Path(shutil.copytree(engine, folder / "engine"))
    break_it(copy)
    manifest = read_raw(copy)
    if manifest.backend == "cpu":
        (copy / PACKED).unlink()
        activations = str(manifest.choices["cpu_activations"])
        config = read_config(copy)
        length = manifest.limits.max_seq_len
        pack_engine(copy, config, length, activations, copy / PACKED, lambda count: None)
    files = hash_files(copy, manifest.files)
    write_manifest(copy, replace(manifest, files=files, digest=engine_digest(files)))
    return copy


def read_raw(engine: Path) -> Manifest:
    """The manifest as it is written, whatever the files' sizes are now."""
    path = engine / "manifest.json"
    data = json.loads(path.read_text())
    for name, record in data["files"].items():
        record["bytes"] = (engine / name).stat().st_size
    path.write_text(json.dumps(data))
    return read_manifest(engine)


def change_tensor(suffix: str, change: Callable[[Tensor], Tensor], rank: int = 0) -> Break:
    """Of the first tensor of that rank whose name ends so."""

    def break_it(engine: Path) -> None:
        path = engine / f"rank{rank}.safetensors"
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        changed = change(tensors[name].clone())
        assert not torch.equal(changed, tensors[name]), f"{name} is what it was"
        save_file({**tensors, name: changed.contiguous()}, path)

    return break_it


def change_json(name: str, change: Callable[[dict[str, Any]], None]) -> Break:
    def break_it(engine: Path) -> None:
        data = json.loads((engine / name).read_text())
        change(data)
        (engine / name).write_text(json.dumps(data))

    return break_it


def change_text(name: str, old: str, new: str) -> Break:
    def break_it(engine: Path) -> None:
        text = (engine / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (engine / name).write_text(text.replace(old, new))

    return break_it


def exchange_ranks(engine: Path) -> None:
    one, other = (engine / f"rank{rank}.safetensors" for rank in range(2))
    kept = one.rename(engine / "kept")
    other.rename(one)
    kept.rename(other)

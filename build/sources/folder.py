"""The files of a model, wherever they lie: their names, their bytes, and what it is called.

A folder on this disk is here; one on a hub, whose weight files come later, is `resolve/hub.py`'s.
Knows no kind of checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from enginehouse.build.sources.safetensors_file import Bytes, Disk
from enginehouse.runtime.errors import CheckpointError


class Folder(Bytes, Protocol):
    """path: where each file is, or will be. names: those of the files. name: the model's.
    label: what to give transformers, a path or a hub id. origin: `owner/name@commit` of a hub.
    """

    @property
    def path(self) -> Path: ...
    @property
    def names(self) -> frozenset[str]: ...
    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def origin(self) -> str | None: ...


class DiskFolder(Disk):
    """A directory; CheckpointError where there is none. A snapshot in the hub's cache is called as
    its repository, another folder as it was given: a link by its own name.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a directory with a config.json; give a Hugging Face checkpoint "
                "directory, a .gguf file or a hub id"
            )
        self.path = path
        self.names = frozenset(item.name for item in path.iterdir() if item.is_file())
        self.label = str(path)
        named = path.resolve() if ".." in path.parts else Path(os.path.abspath(path))
        kind, *repo = named.parent.parent.name.split("--")
        cached = named.parent.name == "snapshots" and kind == "models" and bool(repo)
        self.name = repo[-1] if cached else named.name
        self.origin = f"{'/'.join(repo)}@{named.name}" if cached else None


def as_folder(where: Path | Folder) -> Folder:
    return DiskFolder(where) if isinstance(where, Path) else where

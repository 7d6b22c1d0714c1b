"""An engine in each arithmetic of the compiled backend: itself, or its rank files packed again.

Knows where the builder notes its choice; opens nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from msgspec.structs import replace

from enginehouse.runtime.cpu.packed_file import LAYOUT, PACKED
from enginehouse.runtime.cpu.packing import pack_engine
from enginehouse.runtime.cpu.support import ACTIVATIONS
from enginehouse.runtime.engine import engine_digest, hash_files, read_engine, write_manifest

ALL = ACTIVATIONS
_CHOICE = "cpu_activations"


def engine_in(engine_dir: Path, arithmetic: str, folder: Path) -> Path:
    """The engine itself where it is packed so; else one below folder, made once."""
    engine = read_engine(engine_dir)
    manifest = engine.manifest
    packed = (engine_dir / PACKED).exists()
    if packed and manifest.choices.get(_CHOICE) == arithmetic:
        return engine_dir
    made = folder / f"{manifest.digest.removeprefix('sha256:')[:12]}-{arithmetic}-{LAYOUT}"
    if not made.exists():
        unfinished = made.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for path in engine_dir.iterdir():
            if path.name not in (PACKED, "manifest.json"):
                (unfinished / path.name).symlink_to(path.resolve())
        into = unfinished / PACKED
        pack_engine(unfinished, engine.config, manifest.limits.max_seq_len, arithmetic, into)
        files = hash_files(unfinished, {*manifest.files, PACKED})
        choices = {**manifest.choices, _CHOICE: arithmetic}
        digest = engine_digest(files)
        write_manifest(unfinished, replace(manifest, files=files, digest=digest, choices=choices))
        unfinished.rename(made)
    return made

"""A mended copy of a checkpoint: its JSON written anew, beside hard links of all else.

Knows the lists and the keys; what is to be changed is the rules' business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from enginehouse.build.check.rules import Change
from enginehouse.build.check.stored import LISTS
from enginehouse.build.hf_keys.config_values import read_json
from enginehouse.runtime.errors import CheckpointError

_CONFIG, _MODELOPT = "config.json", "hf_quant_config.json"


def mend(folder: Path, changes: Iterable[Change], output: Path) -> None:
    """Write the copy: under another name first, then renamed.

    Raises CheckpointError for an output that is there.
    """
    if output.exists():
        raise CheckpointError(f"{output} is there already; name another folder, or remove it")
    made = list(changes)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.mkdir()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in (_CONFIG, _MODELOPT):
                _link(path, unfinished / path.name)
        for name in (_CONFIG, _MODELOPT):
            if (folder / name).is_file():
                _write(unfinished / name, _mended(name, read_json(folder / name), made))
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mended(name: str, data: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    if name == _CONFIG and any(change.untie for change in changes):
        data = {**data, "tie_word_embeddings": False}
    key = "quantization_config" if name == _CONFIG else "quantization"
    inner = data.get(key)
    if not isinstance(inner, dict):
        return data
    found = next((each for each in LISTS if each in inner), None)
    added = [entry for change in changes for entry in change.add]
    dropped = {entry for change in changes for entry in change.drop}
    if found is None and not added:
        return data
    found = found or ("exclude_modules" if name == _MODELOPT else "ignore")
    kept = [entry for entry in inner.get(found) or [] if entry not in dropped]
    return {**data, key: {**inner, found: list(dict.fromkeys([*kept, *added]))}}


def _link(path: Path, place: Path) -> None:
    """A hard link; a copy where the folder is on another disk."""
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copy2(path, place)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

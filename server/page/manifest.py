"""What the page shows of an engine's manifest: no path of the machine that built it, no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHOWN = ("name", "created", "backend", "digest", "versions", "limits", "files", "build")
_CHOICES = ("quant", "group_size", "kv_cache_dtype", "format", "gpu", "tp", "pp", "dtype")
_VERIFY = ("mean_kl", "max_kl", "top1_agreement", "num_positions", "max_mean_kl")


def manifest_facts(engine_dir: Path) -> dict[str, Any] | None:
    """None where there is no manifest, as of a checkpoint of other people's."""
    path = engine_dir / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    facts = {name: manifest.get(name) for name in _SHOWN}
    for name, shown in (("choices", _CHOICES), ("verify", _VERIFY)):
        given = manifest.get(name) or {}
        facts[name] = {key: given[key] for key in shown if given.get(key) is not None}
    return facts

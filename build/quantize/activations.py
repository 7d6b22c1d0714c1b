"""How far a walk over the layers has come, on the disk: the calibration set's activations."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class LayerProgress(NamedTuple):
    """A walk over the layers: what enters layer `layer`, and what the caller noted so far."""

    layer: int
    hidden: list[Tensor]
    notes: Mapping[str, Any]


class SavedActivations:
    """The calibration set's activations between two layers, saved every few seconds at most."""

    interval_s = 5.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved_s = time.monotonic()

    def load(self) -> LayerProgress | None:
        """None when there is nothing, or nothing that can be read."""
        try:
            with safe_open(self._path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
                count = len(file.keys())
                hidden = [file.get_tensor(str(i)) for i in range(count)]
        except (OSError, SafetensorError):
            return None
        return LayerProgress(notes.pop("layer"), hidden, notes)

    def save(
        self,
        layer: int,
        hidden: Sequence[Tensor],
        notes: Mapping[str, Any] = {},
        *,
        last: bool = False,
    ) -> None:
        """hidden: each sequence's, as it enters `layer`. Skipped when the last save is recent,
        unless this is the last of all.
        """
        if not last and time.monotonic() - self._saved_s < self.interval_s:
            return
        temporary = self._path.with_suffix(".tmp")
        tensors = {str(i): states.contiguous().cpu() for i, states in enumerate(hidden)}
        with torch.inference_mode():
            save_file(tensors, temporary, {"notes": json.dumps({**notes, "layer": layer})})
        os.replace(temporary, self._path)
        self._saved_s = time.monotonic()

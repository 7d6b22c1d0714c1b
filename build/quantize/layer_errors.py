"""How far each quantised layer is from what it was: kept while layers are made, for the report.

Where layers are quantised one after the other, it is what leaves a layer, of the calibration text,
against the unquantised model's; else the layer's own weights. Both are relative, in the root mean
square. Costs next to nothing: of weights every eighth row is looked at.
"""

from __future__ import annotations

import contextlib
import json
import threading
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from enginehouse.build.forms.block_floats import from_e8m0

STATES, WEIGHTS = "what leaves the layer", "the layer's weights"
_EVERY = 8


class ErrorSum:
    """Of one tensor that is quantised piece by piece: squares of its errors, and of itself."""

    def __init__(self) -> None:
        self.error = self.whole = 0.0

    def see(self, weight: Tensor, q: Tensor, scale: Tensor, block: int | None = None) -> None:
        """A piece [out, in], and the same rows quantised. scale: one for each row, or for each of
        its blocks of so many inputs, [out, blocks]; uint8 is e8m0.
        """
        rows = slice(None, None, _EVERY)
        true, scale = weight[rows].float(), scale[rows]
        scale = from_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
        if block is None:
            scale = scale.view(-1, 1)
        else:
            scale = scale.repeat_interleave(block, dim=1)[:, : true.shape[1]]
        self.error += float((q[rows].float() * scale - true).square().sum())
        self.whole += float(true.square().sum())


class LayerErrors(NamedTuple):
    """of: what was compared, STATES or WEIGHTS. errors: of each layer that was rounded, by its
    number in the whole model.
    """

    of: str
    errors: dict[int, float]


class ErrorLog:
    """A file of JSON lines: a build that was interrupted goes on with it. Threads may add at once;
    of a part that is added again the last counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def add(self, of: str, layer: int, part: str, error: float, whole: float) -> None:
        """Squares of a part's errors, and what they are relative to."""
        line = json.dumps([of, layer, part, error, whole]) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def extend(self, path: Path) -> None:
        """With another log's lines, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text(encoding="utf-8")
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(text)

    def read(self) -> LayerErrors | None:
        """None where nothing was rounded; a last line that was cut off counts for nothing."""
        parts: dict[tuple[int, str], tuple[float, float]] = {}
        of = ""
        with contextlib.suppress(OSError), self._path.open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    of, layer, part, error, whole = json.loads(line)
                    parts[layer, part] = error, whole
        sums: dict[int, tuple[float, float]] = {}
        for (layer, _), (error, whole) in sorted(parts.items()):
            before = sums.get(layer, (0.0, 0.0))
            sums[layer] = before[0] + error, before[1] + whole
        errors = {layer: sqrt(error / whole) for layer, (error, whole) in sums.items() if whole}
        return LayerErrors(of, errors) if errors else None

"""A source's tensors under other names: those that their readers know.

Knows no name itself and reads nothing but what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch

from enginehouse.build.source import TensorInfo, TensorSource


class RenamedTensors:
    """`stored` with each name as `rename` gives it; without those for which it gives None."""

    def __init__(self, stored: TensorSource, rename: Callable[[str], str | None]) -> None:
        self._stored = stored
        self._rename = rename

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name here, and the name there."""
        names = {name: self._rename(name) for name in self._stored.infos}
        return {here: there for there, here in names.items() if here is not None}

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        infos = self._stored.infos
        return {here: infos[there] for here, there in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self._stored.read(self._names.get(name, name), rows)

"""The tensors of a quantised checkpoint, its linears under `MODULE.weight` in float32.

Knows no form: which one a module has is its Layout's business.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import Layout, StoredForm
from enginehouse.build.source import TensorInfo, TensorSource
from enginehouse.build.sources.renamed_tensors import RenamedTensors
from enginehouse.runtime.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class DequantizedTensors:
    """A weight is dequantised whole when some of it is asked for. Each thread keeps the one that it
    read last, as callers go through its rows a few at a time.
    """

    def __init__(self, stored: TensorSource, layout: Layout) -> None:
        self._stored = RenamedTensors(stored, layout.spelt) if layout.spelt else stored
        self._layout = layout
        self._last = threading.local()

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that are quantised: `model.layers.0.mlp.up_proj`."""
        endings = {form.marker for form in self._layout.forms}
        return frozenset(
            name.removesuffix(ending)
            for name in self._stored.infos
            for ending in endings
            if name.endswith(ending)
        )

    @property
    def patterns(self) -> tuple[str, ...]:
        """Their names, numbers of layers and experts left open: `model.layers.*.mlp.up_proj`."""
        return tuple(sorted({_NUMBER.sub("*", module) for module in self.modules}))

    @cached_property
    def _weights(self) -> dict[str, str]:
        """The name of each weight here, and its module."""
        return {module + self._form(module).weight: module for module in self.modules}

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """CheckpointError for a module that lacks a tensor, or whose tensors do not fit."""
        if not self.modules:
            raise CheckpointError(
                f"config.json says that the linears are quantised as {self._layout.name}, but none "
                "is: do config.json and the weights belong together?"
            )
        stored = self._stored.infos
        endings = {ending for form in self._layout.forms for ending in form.endings}
        own = {module + ending for module in self.modules for ending in endings}
        infos = {name: info for name, info in stored.items() if name not in own}
        for name, info in infos.items():
            if name.endswith(".weight") and info.dtype.itemsize == 1:  # its scale is missing
                module = name.removesuffix(".weight")
                self._form(module).shape(self._stored, module)
        for name, module in self._weights.items():
            infos[name] = TensorInfo(torch.float32, self._form(module).shape(self._stored, module))
            bias = f"{module}.bias"  # AutoGPTQ writes zeros for the biases that a model lacks
            if self._form(module).name.startswith("GPTQ") and bias in infos:
                if not self._stored.read(bias).any():
                    del infos[bias]
        return infos

    def _form(self, module: str) -> StoredForm:
        return self._layout.form_of(module)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        module = self._weights.get(name)
        if module is None:
            return self._stored.read(name, rows)
        if rows is None:
            return self._form(module).read(self._stored, module)
        if getattr(self._last, "module", None) != module:
            self._last.weight = self._form(module).read(self._stored, module)
            self._last.module = module
        part: Tensor = self._last.weight[rows].clone()
        return part

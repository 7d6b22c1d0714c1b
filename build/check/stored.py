"""What a quantised checkpoint holds and what its files say of it, as the rules ask for it.

Reads headers and JSON; a tensor only where a rule asks for its numbers. Knows no runtime.
Source: ModelOpt's unified export; compressed-tensors' layout; transformers' quantization configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from enginehouse.build.hf_keys.config_values import read_json
from enginehouse.build.source import TensorInfo
from enginehouse.build.sources.folder import DiskFolder
from enginehouse.build.sources.hf_checkpoint import SafetensorsSource
from enginehouse.build.sources.quantized_config import quantization_config

# Lists of modules that stay as they are, and whether an entry means all that contain it.
LISTS = {
    "ignore": False,
    "exclude_modules": False,
    "modules_to_not_convert": True,
    "ignored_layers": False,
}
PACKED = ("qweight", "weight_packed")
SCALES = ("weight_scale", "weight_scale_inv", "scales", "weight_global_scale", "weight_scale_2")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_NARROW = (torch.float8_e4m3fn, torch.uint8, torch.int8)
_NO_LINEARS = ("embed_tokens", "lm_head", "router")


class Stored:
    """One checkpoint's folder. Raises CheckpointError where that is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization: dict[str, Any] = quantization_config(folder, self.config) or {}
        self.tensors = SafetensorsSource(DiskFolder(folder))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.tensors.infos

    @cached_property
    def modules(self) -> dict[str, frozenset[str]]:
        """Each module, and the last words of its tensors."""
        found: dict[str, set[str]] = {}
        for name in self.infos:
            module, _, word = name.rpartition(".")
            found.setdefault(module, set()).add(word)
        return {module: frozenset(words) for module, words in found.items()}

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The modules of the decoder that are matrices, in the order of their names."""
        return tuple(sorted(module for module in self.modules if self._is_linear(module)))

    def _is_linear(self, module: str) -> bool:
        if ".layers." not in module or module.rpartition(".")[2] in _NO_LINEARS:
            return False
        if self.modules[module] & {*PACKED}:
            return True
        info = self.infos.get(f"{module}.weight")
        is_router = module.endswith(".gate")  # of a mixture; an MLP's is gate_proj
        return info is not None and len(info.shape) == 2 and not is_router

    def is_quantised(self, module: str) -> bool:
        words = self.modules.get(module, frozenset())
        info = self.infos.get(f"{module}.weight")
        narrow = info is not None and info.dtype in _NARROW
        return narrow or bool(words & {*PACKED, *SCALES})

    @cached_property
    def list_name(self) -> str | None:
        """The name of the list that says what is not quantised; None where there is none."""
        return next((name for name in LISTS if name in self.quantization), None)

    @cached_property
    def listed(self) -> tuple[str, ...]:
        """Its entries."""
        found = self.quantization.get(self.list_name or "") or ()
        return tuple(map(str, found)) if isinstance(found, list) else ()

    def entry_of(self, module: str) -> str | None:
        """The entry that says that a module is not quantised."""
        return next((entry for entry in self.listed if self._means(entry, module)), None)

    def _means(self, entry: str, module: str) -> bool:
        if entry.startswith("re:"):
            return re.match(entry.removeprefix("re:"), module) is not None
        if LISTS[self.list_name or "ignore"]:
            return entry in module
        return fnmatchcase(module, entry) or module.startswith(f"{entry}.")

    def groups(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The modules that runtimes fuse into one, as far as they are stored apart: the fused
        module's name and theirs.
        """
        for fused, parts in FUSED.items():
            for module in self.linears:
                home, _, word = module.rpartition(".")
                if word == parts[0]:
                    names = tuple(f"{home}.{part}" for part in parts)
                    yield f"{home}.{fused}", tuple(n for n in names if n in self.modules)

    def whole_scale(self, module: str) -> float | None:
        """NVFP4's scale of a whole weight, as a multiplier; None where a module has none."""
        for word in ("weight_scale_2", "weight_global_scale"):
            info = self.infos.get(f"{module}.{word}")
            if info is not None and info.shape in ((), (1,)):
                number = float(self.tensors.read(f"{module}.{word}").float())
                return 1 / number if word == "weight_global_scale" and number else number
        return None

    def algo_of(self, module: str) -> str | None:
        """The form that MIXED_PRECISION says a module has; None where it says none."""
        layers = self.quantization.get("quantized_layers")
        own = layers.get(module) if isinstance(layers, dict) else None
        return str(own.get("quant_algo")) if isinstance(own, dict) else None

    @property
    def rows_of_blocks(self) -> int | None:
        """Outputs that share a scale of block FP8; None in other forms."""
        size = self.quantization.get("weight_block_size")
        rows = size[0] if isinstance(size, list) and size else None
        return rows if isinstance(rows, int) and rows > 0 else None

    def scale(self, module: str) -> float | None:
        """The one weight scale of a module; None where it has none, or many."""
        for word in ("weight_scale", "weight_scale_inv"):
            info = self.infos.get(f"{module}.{word}")
            if info is not None and info.shape in ((), (1,)):
                return float(self.tensors.read(f"{module}.{word}").float())
        return None

"""A quantised checkpoint of which only config.json is here: the form that its weights will have.

What only weights would tell (whether scales are shared, of which dtype they are) is taken to be as
quantisers usually write it, and `assumed` says what was. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from enginehouse.build.source import TensorSource
from enginehouse.build.sources.quantized_config import QuantizedLayout, left_out, says_fp8_kv
from enginehouse.build.sources.quantized_formats import (
    AwqFormat,
    AwqGemvFormat,
    GptqFormat,
    ModelOptInt4Format,
)
from enginehouse.build.sources.quantized_rows import Fp8Format, Int8Format
from enginehouse.build.sources.quantized_source import QuantizedTensors, engine_linears
from enginehouse.runtime.config import ModelConfig


class PlannedQuantization(QuantizedTensors):
    """config: the model's, unquantised. said: the checkpoint's quantization_config."""

    def __init__(
        self,
        stored: TensorSource,
        layout: QuantizedLayout,
        config: ModelConfig,
        said: Mapping[str, Any],
    ) -> None:
        super().__init__(stored, layout)
        self._config = config
        self._said = said

    @property
    def assumed(self) -> str:
        """What is taken for granted, in words."""
        if isinstance(self._layout.format, Fp8Format):
            if not self._layout.static_activations:
                return "a scale for each row or tensor"
            own = "one scale" if self._is_mixture else "a scale of their own each"
            return f"q, k, v, and gate and up, with {own}"
        if isinstance(self._layout.format, Int8Format):
            return "no factors on the inputs"
        factors = " and factors of the inputs" if self._has_factors(self.modules) else ""
        return f"scales in {str(self._scale_dtype).removeprefix('torch.')}{factors}"

    @property
    def _is_mixture(self) -> bool:
        return self._config.num_experts > 0

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every linear of the decoder that config.json does not leave out."""
        every = (module for group in engine_linears(self._config).values() for module in group)
        return frozenset(module for module in every if not left_out(self._said, module))

    def _check_modules(self, config: ModelConfig) -> None:
        """There is nothing to be checked."""

    def _has_factors(self, modules: Iterable[str]) -> bool:
        return self._layout.pre_quant_scale and isinstance(self._layout.format, ModelOptInt4Format)

    def _share_one_scale(self, group: Sequence[str]) -> bool:
        return self._is_mixture or len(group) == 1

    @cached_property
    def _scale_dtype(self) -> torch.dtype:
        halves = isinstance(self._layout.format, (AwqFormat, AwqGemvFormat, GptqFormat))
        return self._layout.scale_dtype or (torch.float16 if halves else torch.bfloat16)

    def kv_scales(self, config: ModelConfig) -> dict[int, float]:
        """Of each layer one, where config.json says that the cache is FP8; their values are not
        known.
        """
        layers = range(config.num_hidden_layers if says_fp8_kv(self._said) else 0)
        return dict.fromkeys(layers, 1.0)

"""A checkpoint that says it is quantised: its linears as they are stored, or planned from words.

The model is judged before its quantisation: of one that is refused in any form, no other form need
be given. Knows no format and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from enginehouse.build.families.hf_config import model_config
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.planned_quantization import PlannedQuantization
from enginehouse.build.sources.quantized_config import (
    CONFIG_FILES,
    CONFIG_KEYS,
    quantization_config,
    read_layout,
    says_fp8_kv,
    says_unquantised,
)
from enginehouse.build.sources.quantized_source import QuantizedTensors
from enginehouse.runtime.config import DTYPES


def open_quantized(source: SourceCheckpoint) -> SourceCheckpoint:
    """`source` itself when it is unquantised; else with its linears as they are stored.

    Raises CheckpointError for a model that is not supported, and for a quantisation that no engine
    can hold.
    """
    found = quantization_config(source.path, source.config)
    config = {key: value for key, value in source.config.items() if key not in CONFIG_KEYS}
    if found is None:
        said = source.config.get("quantization_config")
        return source if said else replace(source, config=config)
    model = model_config(config, DTYPES[0])
    beside = [source.path / name for name in CONFIG_FILES]
    files = (*source.files, *(path for path in beside if path.exists()))
    source = replace(source, config=config, files=files)
    if says_unquantised(found):
        return _without_kv_scales(source, found)
    layout = read_layout(found)
    if source.has_weights:
        tensors = QuantizedTensors(source.tensors, layout)
        return replace(source, tensors=tensors, quantized=tensors)
    planned = PlannedQuantization(source.tensors, layout, model, found)
    remark = f"config.json alone does not tell, and the plan takes for granted: {planned.assumed}"
    return replace(source, quantized=planned, remarks=(*source.remarks, remark))


def _without_kv_scales(source: SourceCheckpoint, found: Mapping[str, Any]) -> SourceCheckpoint:
    """Weights in 16 bit beside scales of a KV cache, for which such an engine has no place."""
    if says_fp8_kv(found) is None:
        return source
    remark = (
        "the weights are not quantised, and the scales of a quantised KV cache beside them are "
        "left out: an engine has such a cache with FP8 weights only, with scales of its own"
    )
    return replace(source, remarks=(*source.remarks, remark))

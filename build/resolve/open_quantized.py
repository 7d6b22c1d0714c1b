"""A checkpoint that says it is quantised: its linears as they are stored, planned from words, or
dequantised.

The model is judged before its quantisation: of one that is refused in any form, no other form need
be given. Knows no format and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from enginehouse.build.dequantize.config import read_stored_layout
from enginehouse.build.dequantize.tensors import DequantizedTensors
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.source import Dequantized, SourceCheckpoint
from enginehouse.build.sources.planned_quantization import PlannedQuantization
from enginehouse.build.sources.quantized_config import (
    CONFIG_FILES,
    CONFIG_KEYS,
    QuantizedLayout,
    quantization_config,
    read_layout,
    says_fp8_kv,
    says_unquantised,
)
from enginehouse.build.sources.quantized_source import QuantizedTensors
from enginehouse.build.sources.stacked_experts import stacked_experts
from enginehouse.runtime.config import DTYPES
from enginehouse.runtime.errors import CheckpointError

_UNQUANTISED = "give the unquantised checkpoint and choose --quant"
_DEQUANTIZE = "pass --dequantize, which makes it a source of every --quant"


def open_quantized(source: SourceCheckpoint, dequantize: bool | None = False) -> SourceCheckpoint:
    """`source` itself when it is unquantised; else with its linears as they are stored, or with
    the weights that they mean (dequantize; None where it is quantised).

    Raises CheckpointError for a model that is not supported, for a quantisation that no engine can
    hold, or that cannot be read, and where there is nothing to dequantise.
    """
    found = quantization_config(source.path, source.config)
    config = {key: value for key, value in source.config.items() if key not in CONFIG_KEYS}
    if dequantize and (found is None or says_unquantised(found)):
        raise CheckpointError(f"{source.name} is not quantised: leave dequantize out")
    if found is None:
        said = source.config.get("quantization_config")
        return source if said else replace(source, config=config)
    model = model_config(config, DTYPES[0])
    beside = [source.path / name for name in CONFIG_FILES]
    files = (*source.files, *(path for path in beside if path.exists()))
    source = replace(source, config=config, files=files)
    if says_unquantised(found):
        return _without_kv_scales(source, found)
    if dequantize is not False:
        return _dequantized(source, found)
    layout = _layout(found)
    if source.has_weights:
        tensors = QuantizedTensors(source.tensors, layout)
        return replace(source, tensors=tensors, quantized=tensors)
    planned = PlannedQuantization(source.tensors, layout, model, found)
    remark = f"config.json alone does not tell, and the plan takes for granted: {planned.assumed}"
    return replace(source, quantized=planned, remarks=(*source.remarks, remark))


def _layout(found: Mapping[str, Any]) -> QuantizedLayout:
    """As an engine can hold it; CheckpointError with what else can be done."""
    try:
        return read_layout(found)
    except CheckpointError as refusal:
        try:
            read_stored_layout(found)
        except CheckpointError:
            raise CheckpointError(f"{refusal}: {_UNQUANTISED}") from None
        raise CheckpointError(f"{refusal}: {_DEQUANTIZE}") from None


def _dequantized(source: SourceCheckpoint, found: Mapping[str, Any]) -> SourceCheckpoint:
    """With the weights that its linears mean, in float32; of a config alone, only saying so."""
    try:
        layout = read_stored_layout(found)
    except CheckpointError as refusal:
        raise CheckpointError(f"{refusal}: {_UNQUANTISED}") from None
    if says_fp8_kv(found):
        remark = "the scales of the checkpoint's FP8 KV cache are left out with --dequantize"
        source = replace(source, remarks=(*source.remarks, remark))
    if not source.has_weights:
        return replace(source, dequantized=Dequantized(layout.name, ()))
    tensors = DequantizedTensors(source.tensors, layout)
    dequantized = Dequantized(layout.name, tensors.patterns)
    architecture = model_config(source.config, DTYPES[0]).architecture
    stacks = stacked_experts(tensors, architecture)
    return replace(source, tensors=stacks, dequantized=dequantized)


def _without_kv_scales(source: SourceCheckpoint, found: Mapping[str, Any]) -> SourceCheckpoint:
    """Weights in 16 bit beside scales of a KV cache, for which such an engine has no place."""
    if says_fp8_kv(found) is None:
        return source
    remark = (
        "the weights are not quantised, and the scales of a quantised KV cache beside them are "
        "left out: an engine has such a cache with FP8 weights only, with scales of its own"
    )
    return replace(source, remarks=(*source.remarks, remark))

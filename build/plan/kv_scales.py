"""Whether a source's own scales for an FP8 KV cache go into the engine, or none are there.

TensorRT-LLM takes FP8 keys and values with FP8 weights only. Knows no tensor.
"""

from __future__ import annotations

from enginehouse.build.forms.weight_forms import FP8_FORMS
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.config import ModelConfig


def carries_kv_scales(
    settings: BuildSettings, source: SourceCheckpoint, config: ModelConfig
) -> bool:
    """Whether the source has the scales of an FP8 KV cache, and the engine is to have one too."""
    wanted = settings.quant in FP8_FORMS and settings.kv_cache_dtype in ("auto", "fp8")
    return wanted and source.quantized is not None and bool(source.quantized.kv_scales(config))

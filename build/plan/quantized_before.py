"""What it means for a plan that its source was quantised before: scales of a KV cache that go into
the engine, backends that would round again, weights that are rounded twice.

Knows the names of forms and dtypes, no tensor.
"""

from __future__ import annotations

from enginehouse.build.forms.weight_forms import FP8_FORMS
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.source import Dequantized, SourceCheckpoint
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import PlanError

OWN_BACKENDS = ("cpu", "torch")  # which run a checkpoint's own numbers


def carries_kv_scales(
    settings: BuildSettings, source: SourceCheckpoint, config: ModelConfig
) -> bool:
    """Whether the source has the scales of an FP8 KV cache, and the engine is to have one too:
    TensorRT-LLM takes FP8 keys and values with FP8 weights only.
    """
    wanted = settings.quant in FP8_FORMS and settings.kv_cache_dtype in ("auto", "fp8")
    return wanted and source.quantized is not None and bool(source.quantized.kv_scales(config))


def check_own_int8(settings: BuildSettings, source: SourceCheckpoint) -> None:
    """PlanError where a source's rows of INT8 would be rounded again, by who compiles 16 bits."""
    own = source.quantized is not None and source.engine_config is None
    if own and settings.quant == "int8" and settings.backend not in OWN_BACKENDS:
        raise PlanError(
            f"backend={settings.backend} makes INT8 of 16-bit weights by itself, and {source.name} "
            "is in INT8 already; choose backend=cpu or torch, which hold its numbers as they are, "
            "or pass --dequantize"
        )


def rounded_twice(dequantized: Dequantized, quant: str, config: ModelConfig) -> str:
    """One sentence: which weights, in which form first and in which then.

    A weight in float32 is what the checkpoint means and is rounded no second time.
    """
    which = ", ".join(dequantized.modules) or "every quantised linear"
    name, dtype = dequantized.name, config.dtype
    kept = f"{which}: dequantised from {name} and held in float32 as they are"
    if quant == "none":
        twice = f"{which}: rounded twice, to {name} and then to {dtype}"
        return kept if dtype == "float32" else twice
    rest = "kept in float32" if dtype == "float32" else f"to {dtype}"
    return (
        f"{which}: rounded twice, to {name} and then to {quant} ({rest} where the engine has no "
        "such form); verify compares with the checkpoint's own weights"
    )

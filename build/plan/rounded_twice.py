"""What a plan rounds that was rounded before: the weights of a checkpoint that is dequantised.

Knows the names of forms and dtypes, no tensor.
"""

from __future__ import annotations

from enginehouse.build.source import Dequantized
from enginehouse.runtime.config import ModelConfig


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

"""`exclude` patterns -> the checkpoint's exclude_modules, checked against the model's modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from enginehouse.build.forms import is_quantized
from enginehouse.runtime.config import QuantConfig
from enginehouse.runtime.errors import PlanError


def with_excluded(patterns: str, modules: Iterable[str], quantization: QuantConfig) -> QuantConfig:
    """`quantization` with the patterns (separated by commas) after its own.

    modules: every module's name as TensorRT-LLM has it; layers count from 0 in each pipeline
    stage. It runs fc and gate as one product, and its W8A16 loader quantises every decoder linear
    by name: patterns that contradict this are refused, as is one that matches nothing.
    """
    modules = list(modules)
    asked = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in asked:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise PlanError(
                f"exclude: {pattern!r} matches no module; they are named "
                "transformer.layers.0.attention.qkv, .attention.dense, .mlp.fc, .mlp.gate, "
                ".mlp.proj, lm_head: write, say, *mlp.proj or *layers.0.*"
            )
    known = quantization.exclude_modules or ()
    result = replace(quantization, exclude_modules=tuple(dict.fromkeys((*known, *asked))))
    linears = {module for module in modules if is_quantized(quantization, f"{module}.weight")}
    for module in sorted(module for module in linears if result.excludes(module)):
        if quantization.quant_algo == "W8A16":
            raise PlanError(
                f"exclude: {module} cannot be left out of int8: TensorRT-LLM's loader quantises "
                "every linear of a decoder layer by its name; choose another quant"
            )
        for one, other in (("mlp.fc", "mlp.gate"), ("mlp.gate", "mlp.fc")):
            pair = module.replace(one, other)
            if module.endswith(one) and not result.excludes(pair):
                raise PlanError(
                    f"exclude: {module} without {pair}; they run as one product: exclude both"
                )
    return result

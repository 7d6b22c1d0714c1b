"""What of a plan was chosen, settled: what a later build of the same engine is compared with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from enginehouse.build.plan.build_plan import BuildPlan

# Where an engine is put or how far a build goes says nothing of the engine itself.
_NOT_CHOICES = ("output", "until", "model", "workers", "ignore_tensors")

_ONLY_WHERE_SET = ("plan_layers", "bake_weights", "dequantize", "effective_bits", "max_kl")


def choices(plan: BuildPlan) -> dict[str, Any]:
    """Every choice that shapes the engine, settled: what a later build is compared with."""
    settled = asdict(plan.settings)
    settled |= {
        "name": plan.name,
        "max_seq_len": plan.max_seq_len,
        "max_num_tokens": plan.max_num_tokens,
        "trtllm_build": plan.builder_flags,
        "group_size": plan.group_size,
        "dtype": plan.config.dtype,
    }
    if layers := plan.config.quantization.quantized_layers:
        settled["quantized_layers"] = {module: own.quant_algo for module, own in layers}
    unset = {key for key in _ONLY_WHERE_SET if not settled[key]}
    if settled["verify_with"] == "reference":  # as engines were verified before there was a choice
        unset.add("verify_with")
    if not plan.padding.rows and not plan.padding.columns:  # nothing to choose
        unset.add("pad")
    if settled["backend"] != "cpu":
        unset.add("cpu_activations")
    return {k: value for k, value in settled.items() if k not in unset.union(_NOT_CHOICES)}

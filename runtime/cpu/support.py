"""What the compiled backend does not run yet: said when a build is planned, and when one is loaded.

Knows words and numbers of config.json, no tensor.
"""

from __future__ import annotations

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.cpu.kernel_sizes import LANES, STEP, UNIT

_GROUPED = ("W4A16_AWQ", "W4A8_AWQ")
_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A16", *_GROUPED)  # of `quant_algo`
ACTIVATIONS = ("int8", "bf16")  # what inputs of products in INT4 and INT8 are rounded to
_MOST_HEAD = 576


def cpu_refusal(config: ModelConfig, kv_block_size: int, compute_dtype: str) -> str | None:
    """Why backend=cpu does not run a model, in one sentence; None where it does."""
    reason = _form(config) or _sizes(config, kv_block_size)
    if reason is None and compute_dtype == "float32":
        reason = "compute_dtype=float32"
    return (
        None if reason is None else f"{reason} is not yet run by backend=cpu; choose backend=torch"
    )


def _form(config: ModelConfig) -> str | None:
    quantization = config.quantization
    algo = quantization.quant_algo
    if algo not in (None, *_ALGOS):
        return f"quant_algo={algo}"
    if algo in _GROUPED and quantization.group_size % STEP:
        return f"group_size={quantization.group_size}"
    return None


def _sizes(config: ModelConfig, kv_block_size: int) -> str | None:
    if kv_block_size % UNIT:
        return f"kv_block_size={kv_block_size}, which {UNIT} does not divide,"
    if config.delta is not None:
        sizes = (config.delta.key_size, config.delta.value_size)
        if any(size % LANES for size in sizes):
            return f"linear attention with heads of {sizes[0]} and {sizes[1]} elements"
    layers = map(config.of_layer, range(config.num_hidden_layers))
    if (size := max(own.head_size for own in layers)) > _MOST_HEAD:
        return f"head_size={size}"
    if config.latent is not None and config.latent.nope > _MOST_HEAD:
        return f"qk_nope_head_dim={config.latent.nope}"
    return None

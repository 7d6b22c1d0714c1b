"""The forms weights can be written in, and the tensors that each puts in place of a weight.

Knows names, dtypes and shapes; the arithmetic is in quantization.py and quantize/awq.py.
Source: TensorRT-LLM 1.2.1 checkpoint format, quantization object and tensors of each algorithm.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from enginehouse.runtime.config import EXCLUDE_MODULES, QuantConfig

QUANT_CONFIGS: dict[str, QuantConfig] = {
    "none": QuantConfig(),
    "fp8": QuantConfig(quant_algo="FP8"),
    "fp8_rowwise": QuantConfig(
        quant_algo="FP8_PER_CHANNEL_PER_TOKEN",
        exclude_modules=(*EXCLUDE_MODULES, "*ln_f", "*ln_embed"),
    ),
    "int4": QuantConfig(quant_algo="W4A16_AWQ"),
    "int4_awq": QuantConfig(quant_algo="W4A16_AWQ", pre_quant_scale=True),
    "w4a8_awq": QuantConfig(quant_algo="W4A8_AWQ", pre_quant_scale=True),
    "int8": QuantConfig(quant_algo="W8A16"),
}
# Forms of a quantised Hugging Face checkpoint alone, in ModelOpt's words: no engine here has them.
EXPORT_CONFIGS: dict[str, QuantConfig] = {
    "nvfp4": QuantConfig(quant_algo="NVFP4", group_size=16),
    "w4a16_nvfp4": QuantConfig(quant_algo="W4A16_NVFP4", group_size=16),
    "mxfp8": QuantConfig(quant_algo="MXFP8", group_size=32),
    "fp8_block": QuantConfig(quant_algo="FP8_PB_WO", group_size=128),
    "mixed": QuantConfig(quant_algo="MIXED_PRECISION"),
}
# Those that TensorRT-LLM has kernels for, largest first.
GROUP_SIZES = {"int4": (128, 64), "int4_awq": (128, 64), "w4a8_awq": (128,)}
FP8_FORMS = ("fp8", "fp8_rowwise")
EXPORT_ALGOS = {config.quant_algo: quant for quant, config in EXPORT_CONFIGS.items()}
KV_CACHE_ALGOS = {"auto": None, "fp8": "FP8", "int8": "INT8"}


# What is multiplied into others, and what is small.
_NEVER = (
    *("router", "kv_b", "per_layer_gate", "per_layer_proj", "laurel_left", "laurel_right"),
    *("stream_predictions", "stream_corrections", "in_ba", "conv1d"),
)
FLOAT32_WORDS = ("A_log", "dt_bias")  # of what is float32 in every form


class OutputTensor(NamedTuple):
    """One tensor of a rank file: torch's name of the dtype, and the shape on this rank."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        import torch  # here, as the settings' own help needs none of it

        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize


def is_quantized(quantization: QuantConfig, target: str) -> bool:
    """Whether a tensor is the weight of a linear in a decoder layer that is not excluded.

    Routers stay as they are in every form, what makes keys and values of latents, which is
    multiplied into queries, what makes the rates of linear attention, and what takes up a layer's
    own inputs.
    """
    module, _, kind = target.rpartition(".")
    linear = ".layers." in target and kind == "weight"
    linear = linear and "layernorm" not in module and not module.endswith(_NEVER)
    return linear and quantization.quant_algo is not None and not quantization.excludes(module)


def linear_tensors(
    quantization: QuantConfig,
    dtype: str,
    module: str,
    out_features: int,
    in_features: int,
    scale_dtype: str | None = None,
) -> dict[str, OutputTensor]:
    """What stands on disk for a linear's weight, by name; features are those of one rank.

    INT4 scales are written in the model's dtype: the loader casts them to it, so the values on
    disk are those that a GPU computes with. Those of a source keep their own, scale_dtype. W8A16
    is the form that fits every GPU: the weight as it is, which the loader of each rank quantises;
    but of a source in INT8 its own rows and scales.
    """
    weight, one = f"{module}.weight", OutputTensor("float32", (1,))
    quantised = is_quantized(quantization, weight)
    quantization = quantization.of(module)
    algo, group_size = quantization.quant_algo, quantization.group_size
    if algo == "W8A16" and quantised and scale_dtype is not None:
        return {
            weight: OutputTensor("int8", (out_features, in_features)),
            f"{module}.per_channel_scale": OutputTensor(scale_dtype, (out_features,)),
        }
    if algo in (None, "W8A16") or not quantised:
        return {weight: OutputTensor(dtype, (out_features, in_features))}
    if algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        table = {weight: OutputTensor("float8_e4m3fn", (out_features, in_features))}
        if algo == "FP8":
            table[f"{module}.activation_scaling_factor"] = one
            table[f"{module}.weights_scaling_factor"] = one
        else:
            table[f"{module}.per_channel_scale"] = OutputTensor("float32", (out_features,))
        return table
    if algo in EXPORT_ALGOS:
        return _block_tensors(quantization, module, out_features, in_features)
    assert algo in ("W4A16_AWQ", "W4A8_AWQ"), algo
    table = {
        weight: OutputTensor("int8", (out_features // 2, in_features)),
        f"{module}.weights_scaling_factor": OutputTensor(
            scale_dtype or dtype, (out_features, in_features // group_size)
        ),
    }
    if quantization.has_zero_point:
        table[f"{module}.zero"] = OutputTensor(dtype, (in_features // group_size, out_features))
    if quantization.pre_quant_scale:
        table[f"{module}.prequant_scaling_factor"] = OutputTensor(dtype, (in_features,))
    if algo == "W4A8_AWQ":
        table[f"{module}.weights_scaling_factor_2"] = one
        table[f"{module}.activation_scaling_factor"] = one
    return table


def _block_tensors(
    quantization: QuantConfig, module: str, out_features: int, in_features: int
) -> dict[str, OutputTensor]:
    """Of a form that only a Hugging Face checkpoint has, under the names of the others. Block FP8
    has its scale once for each output, as a fused linear's blocks are those of its parts.
    """
    one, algo = OutputTensor("float32", (1,)), quantization.quant_algo
    weight, scale = f"{module}.weight", f"{module}.weights_scaling_factor"
    blocks = (out_features, -(-in_features // quantization.group_size))
    if algo in ("NVFP4", "W4A16_NVFP4"):
        table = {
            weight: OutputTensor("uint8", (out_features, in_features // 2)),
            scale: OutputTensor("float8_e4m3fn", blocks),
            f"{module}.weights_scaling_factor_2": one,
        }
        if algo == "NVFP4":
            table[f"{module}.activation_scaling_factor"] = one
        return table
    return {
        weight: OutputTensor("float8_e4m3fn", (out_features, in_features)),
        scale: OutputTensor("uint8" if algo == "MXFP8" else "float32", blocks),
    }

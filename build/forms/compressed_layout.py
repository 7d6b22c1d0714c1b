"""A module's tensors in ModelOpt's names and shapes -> compressed-tensors' own, by their form.

Values stay what they are, but for NVFP4's scales of whole tensors, which are divisors there: each
is rounded once. Knows no model.
Source: compressed-tensors 0.20, compressors/; vLLM 0.33, compressed_tensors/schemes/.
"""

from __future__ import annotations

import torch
from torch import Tensor

from enginehouse.runtime.checkpoint.packing import unpack_int4

# Forms that the layout has; it has no place for factors on the inputs.
COMPRESSED_QUANTS = (
    *("none", "fp8", "fp8_rowwise", "int4"),
    *("nvfp4", "w4a16_nvfp4", "mxfp8", "fp8_block", "mixed"),
)


def compressed(
    algo: str | None, module: str, kind: str, tensor: Tensor, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """What stands for one of a module's tensors: `kind` is its last word. None for factors of ones.

    scale_dtype: of INT4's group scales, of which the float32 ones are values.
    """
    if kind in ("k_scale", "v_scale"):
        return {f"{module.rpartition('.')[0]}.{kind}": tensor.reshape(1)}
    if algo in ("NVFP4", "W4A16_NVFP4"):
        words = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
        if kind in words:
            return {f"{module}.{words[kind]}": tensor.reciprocal().reshape(1)}
        return {f"{module}.{'weight_packed' if kind == 'weight' else kind}": tensor}
    if algo == "W4A16_AWQ":
        return _packed(module, kind, tensor, scale_dtype)
    if kind == "input_scale" or (kind == "weight_scale" and algo == "FP8"):
        return {f"{module}.{kind}": tensor.reshape(1)}
    if kind == "weight_scale" and algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return {f"{module}.{kind}": tensor.unsqueeze(1)}
    return {f"{module}.{kind}": tensor}


def _packed(module: str, kind: str, tensor: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """pack-quantized: eight of a row's integers, 8 higher, in an int32, the first one lowest."""
    if kind == "weight_scale":
        return {f"{module}.{kind}": tensor.to(scale_dtype)}
    if kind != "weight":
        return {} if kind == "pre_quant_scale" else {f"{module}.{kind}": tensor}
    half, in_features = tensor.shape
    if tensor.is_meta:
        packed = torch.empty(2 * half, in_features // 8, dtype=torch.int32, device="meta")
        shape = torch.empty(2, dtype=torch.int64, device="meta")
    else:
        nibbles = (unpack_int4(tensor.view(torch.int8)) + 8).view(torch.uint8)
        packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)
        shape = torch.tensor([2 * half, in_features])
    return {f"{module}.weight_packed": packed, f"{module}.weight_shape": shape}

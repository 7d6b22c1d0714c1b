"""Unified quantised Hugging Face checkpoints: made as the command line does, and what they mean.

`meant` dequantises by the layout's own document; nothing of build/ takes part in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from enginehouse.build.source import SourceCheckpoint, TensorInfo
from makers.engines import build_engine

SHORT = {"calib_samples": 1, "calib_length": 64}
Tensors = dict[str, Tensor]


def exported(source: SourceCheckpoint, path: Path, **settings: Any) -> Path:
    return build_engine(source, path, format="hf", **{**SHORT, **settings})


def choices(form: str) -> dict[str, Any]:
    """fp8_kvfp8 -> the settings of a build."""
    quant, _, kv = form.partition("_kv")
    return {"quant": quant, "kv_cache_dtype": kv or "auto", "dtype": "bfloat16"}


def meant(tensors: Tensors, algo: str | None) -> Tensors:
    """Every weight of a unified checkpoint in float32, from the layout's own document: FP8 times
    its scale; INT4 in two's complement, two rows a byte, the even one low; blocks of small floats.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name.removesuffix('weight')}weight_scale")
        scale = tensors.get(f"{name.removesuffix('weight')}weight_scale_inv", scale)
        if not name.endswith((".weight", ".bias", "_bias", "A_log")):
            continue
        if scale is None or not name.endswith(".weight"):
            result[name] = tensor
        elif scale.ndim == 2 and algo not in ("W4A16_AWQ", "W4A8_AWQ"):
            second = tensors.get(f"{name.removesuffix('weight')}weight_scale_2", torch.ones(()))
            result[name] = meant_blocks(tensor, scale, second)
        elif tensor.dtype == torch.float8_e4m3fn:
            result[name] = tensor.float() * scale.reshape(-1, 1)
        else:
            data = tensor.numpy()
            nibbles = np.stack([data & 15, data >> 4], axis=1).reshape(-1, data.shape[1])
            q = ((nibbles.astype(np.int16) + 8) % 16 - 8).astype(np.float32)
            each = np.repeat(scale.numpy(), data.shape[1] // scale.shape[1], axis=1)
            result[name] = torch.from_numpy(q * each)
    return result


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def meant_blocks(q: Tensor, scale: Tensor, second: Tensor) -> Tensor:
    """float32 of NVFP4, MXFP8 and block FP8: a byte of e2m1 holds two inputs, the even one low; a
    scale of bytes is a power of two; a block may end before its last element.
    """
    if q.dtype == torch.uint8:
        data = q.numpy()
        nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
        values = E2M1[nibbles & 7] * np.where(nibbles & 8, -1, 1).astype(np.float32)
    else:
        values = q.float().numpy()
    powers = scale.dtype == torch.uint8
    numbers = 2.0 ** (scale.numpy().astype(np.float32) - 127) if powers else scale.float().numpy()
    block = (1, values.shape[1] // scale.shape[1]) if len(scale) == len(q) else (128, 128)
    each = np.kron(numbers, np.ones(block, np.float32))[: values.shape[0], : values.shape[1]]
    return torch.from_numpy(values * (each * float(second)).astype(np.float32))


def meant_with_factors(stored: Tensors) -> Tensors:
    tensors = {name: tensor.float() for name, tensor in meant(stored, "W4A16_AWQ").items()}
    for name in stored:
        if name.endswith(".pre_quant_scale"):
            tensors[f"{name.removesuffix('pre_quant_scale')}weight"] *= stored[name].float()
    return tensors


def save(tensors: Tensors, path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})


class Named:
    """A TensorSource of tensors in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]

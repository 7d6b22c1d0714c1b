"""Writers of quantised checkpoints that are read by --dequantize alone, number by number from each
format's document, beside the float32 checkpoint that each means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from makers.quantized_writers import (
    BRAIN,
    FLOAT,
    HALF,
    Draw,
    Kind,
    Writer,
    Written,
    awq_gemv,
    ct_config,
    fp8,
)
from makers.stored_integers import Integers, gptq, int8, packed, smooth_int8


def block_fp8(word: str, dtype: torch.dtype, rows: int = 128, columns: int = 128) -> Writer:
    """Blocks at an edge are smaller; `dtype` float8_e8m0fnu holds powers of two."""
    draw = Draw(0, True, FLOAT, seed=9)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        q = draw.fp8(out, inn)
        scale = torch.tensor(
            [[draw.scale(inn) for _ in range(0, inn, columns)] for _ in range(0, out, rows)]
        ).to(dtype)
        i, j = torch.arange(out)[:, None] // rows, torch.arange(inn)[None] // columns
        weight = q.float() * scale.float()[i, j]
        return {"weight": q, word: scale}, weight

    return write


# What a nibble of e2m1 means, from OCP's MX 1.0, table 5; its highest bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WHOLE = 0.0078125 * 1.3


def nibbles(rng: np.random.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """uint8 [..., n / 2], the even element in the low nibble, and what is meant [..., n]."""
    codes = rng.integers(0, 16, shape)
    stored = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return torch.from_numpy(stored), torch.tensor(E2M1)[torch.from_numpy(codes)]


def nvfp4(compressed: bool, with_factor: tuple[str, ...] = ()) -> Writer:
    """compressed: as compressed-tensors names it, its whole number a divisor; else ModelOpt's."""
    rng = np.random.default_rng(12)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        q, values = nibbles(rng, out, inn)
        scale = torch.from_numpy(rng.uniform(1, 8, (out, inn // 16))).to(torch.float8_e4m3fn)
        whole = torch.tensor(1 / WHOLE if compressed else WHOLE)
        number = 1 / float(whole) if compressed else float(whole)
        weight = values.double() * scale.double()[:, torch.arange(inn) // 16] * number
        if compressed:
            stored = {"weight_packed": q, "weight_global_scale": whole.view(1)}
            stored |= {"weight_scale": scale, "input_global_scale": torch.tensor([3.0])}
            return stored, weight.float()
        stored = {"weight": q, "weight_scale": scale, "weight_scale_2": whole}
        if module.endswith(with_factor):
            factor = torch.from_numpy(rng.uniform(0.5, 2, inn)).to(BRAIN)
            stored["pre_quant_scale"] = factor
            weight = weight * factor.double()
        return stored, weight.float()

    return write


def mx(in_bytes: bool, word: str) -> Writer:
    """Powers of two for 32 inputs each. in_bytes: elements of e4m3, else of e2m1."""
    rng, draw = np.random.default_rng(13), Draw(0, True, FLOAT, seed=14)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        exponents = torch.from_numpy(rng.integers(116, 122, (out, inn // 32)))
        q, values = nibbles(rng, out, inn)
        if in_bytes:
            q = draw.fp8(out, inn)
            values, exponents = q.float(), exponents - 4
        scale = 2.0 ** (exponents.double() - 127)
        weight = values.double() * scale[:, torch.arange(inn) // 32]
        return {word: q, "weight_scale": exponents.to(torch.uint8)}, weight.float()

    return write


def either(first: Writer, second: Writer, second_has: tuple[str, ...]) -> Writer:
    """Modules of some names by another writer."""
    return lambda module, out, inn: (second if module.endswith(second_has) else first)(
        module, out, inn
    )


def mixed_layers(second_has: tuple[str, ...], second: str) -> dict[str, Any]:
    """ModelOpt's `quantized_layers` of a tiny Llama: NVFP4, and another algorithm for some."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    names = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in names]
    nvfp4 = {"quant_algo": "NVFP4", "group_size": 16}
    return {
        module: {"quant_algo": second} if module.endswith(second_has) else nvfp4
        for module in modules
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
_INT = {"type": "int", "symmetric": True}
_BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
_DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
_FP4 = {"num_bits": 4, "type": "float"}
_NVFP4 = "nvfp4-pack-quantized"
_MODELOPT = {"quant_method": "modelopt"}
_AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "packing_format": "auto_round:llm_compressor",
}
_W8A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
# What the plan calls each.
NAMES: dict[str, str] = {
    "gptq act-order": "GPTQ of 4 bits",
    "gptq 8 bits": "GPTQ of 8 bits",
    "gptq 3 bits": "GPTQ of 3 bits",
    "gptq 2 bits": "GPTQ of 2 bits",
    "auto-round 6 bits": "GPTQ of 6 bits",
    "awq gemv": "AutoAWQ",
    "w8a16 packed": "compressed-tensors' packed integers of 8 bits",
    "w4a16 act-order": "compressed-tensors' packed integers of 4 bits",
    "w8a8": "compressed-tensors INT8",
    "w8a8 asymmetric": "compressed-tensors INT8",
    "deepseek fp8": "FP8 in blocks of 128 x 128",
    "block fp8 e8m0": "FP8 in blocks of 96 x 40",
    "compressed-tensors block fp8": "FP8 in blocks of 128 x 128",
    "nvfp4": "NVFP4",
    "nvfp4 awq": "NVFP4",
    "mxfp8": "MXFP8",
    "mixed precision": "FP8 and NVFP4",
    "compressed-tensors nvfp4": "NVFP4",
    "compressed-tensors mxfp4": "MXFP4",
    "modelopt int8": "ModelOpt INT8",
    "auto-round mxfp4": "MXFP4",
    "auto-round nvfp4": "NVFP4",
    "quark": "FP8 and MXFP4",
    "compressed-tensors mixed": "FP8 and compressed-tensors' packed integers of 4 bits",
}
STORED: dict[str, Kind] = {
    "gptq act-order": Kind(lambda: gptq(Integers(4, 128, True, act_order=True), 1), _GPTQ, ""),
    "gptq 8 bits": Kind(
        lambda: gptq(Integers(8, -1, False, FLOAT), 0),
        {**_GPTQ, "bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
        "",
    ),
    "gptq 3 bits": Kind(
        lambda: gptq(Integers(3, 32, False, act_order=True), 1),
        {**_GPTQ, "bits": 3, "group_size": 32, "sym": False},
        "",
    ),
    "gptq 2 bits": Kind(
        lambda: gptq(Integers(2, 64, True), 1), {**_GPTQ, "bits": 2, "group_size": 64}, ""
    ),
    "auto-round 6 bits": Kind(
        lambda: gptq(Integers(6, 32, False), 1),
        {
            **_AUTOROUND,
            "bits": 6,
            "group_size": 32,
            "sym": False,
            "packing_format": "auto_round:auto_gptq",
        },
        "",
    ),
    "awq gemv": Kind(
        lambda: awq_gemv(Draw(32, False, HALF)),
        {"quant_method": "awq", "bits": 4, "version": "gemv", "group_size": 32, "zero_point": True},
        "",
    ),
    "w8a16 packed": Kind(
        lambda: packed(Integers(8, -1, True, BRAIN)),
        ct_config({**_INT, "num_bits": 8, "strategy": "channel"}, None, "pack-quantized"),
        "",
    ),
    "w4a16 act-order": Kind(
        lambda: packed(Integers(4, 32, False, BRAIN, act_order=True)),
        ct_config(
            {**_INT, "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
            None,
            "pack-quantized",
        ),
        "",
    ),
    "w8a8": Kind(
        lambda: int8(Integers(8, -1, True, BRAIN)),
        ct_config({**_INT, "num_bits": 8, "strategy": "channel"}, _W8A8, "int-quantized"),
        "",
    ),
    "w8a8 asymmetric": Kind(
        lambda: int8(Integers(8, -1, False, FLOAT)),
        ct_config(
            {**_INT, "num_bits": 8, "strategy": "channel", "symmetric": False},
            _W8A8,
            "int-quantized",
        ),
        "",
    ),
    "deepseek fp8": Kind(
        lambda: block_fp8("weight_scale_inv", FLOAT),
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        "",
    ),
    "block fp8 e8m0": Kind(
        lambda: block_fp8("weight_scale_inv", torch.float8_e8m0fnu, 96, 40),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [96, 40],
        },
        "",
    ),
    "compressed-tensors block fp8": Kind(
        lambda: block_fp8("weight_scale", BRAIN),
        ct_config(_BLOCK, _DYNAMIC, "float-quantized"),
        "",
    ),
    "nvfp4": Kind(lambda: nvfp4(False), {**_MODELOPT, "quant_algo": "NVFP4", "group_size": 16}, ""),
    "nvfp4 awq": Kind(
        lambda: nvfp4(False, ("o_proj", "down_proj")),
        {**_MODELOPT, "quant_algo": "NVFP4_AWQ", "group_size": 16, "pre_quant_scale": True},
        "",
    ),
    "mxfp8": Kind(
        lambda: mx(True, "weight"), {**_MODELOPT, "quant_algo": "MXFP8", "group_size": 32}, ""
    ),
    "mixed precision": Kind(
        lambda: either(nvfp4(False), fp8(Draw(0, True, FLOAT), "tensor", True), ("v_proj",)),
        {
            **_MODELOPT,
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": mixed_layers(("v_proj",), "FP8"),
        },
        "",
    ),
    "compressed-tensors nvfp4": Kind(
        lambda: nvfp4(True),
        ct_config({**_FP4, "strategy": "tensor_group", "group_size": 16}, None, _NVFP4),
        "",
    ),
    "compressed-tensors mxfp4": Kind(
        lambda: mx(False, "weight_packed"),
        ct_config({**_FP4, "strategy": "group", "group_size": 32}, None, "mxfp4-pack-quantized"),
        "",
    ),
    "compressed-tensors mixed": Kind(
        lambda: either(
            packed(Integers(4, 32, True)),
            fp8(Draw(0, True, FLOAT), "channel", False),
            ("down_proj",),
        ),
        {
            **ct_config({}, None, "mixed-precision"),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "weights": {**_INT, "num_bits": 4, "strategy": "group", "group_size": 32},
                },
                "group_1": {
                    "targets": ["re:.*down_proj$"],
                    "format": "float-quantized",
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                },
            },
        },
        "",
    ),
    "auto-round mxfp4": Kind(
        lambda: mx(False, "weight_packed"),
        {**_AUTOROUND, "data_type": "mx_fp", "group_size": 32},
        "",
    ),
    "auto-round nvfp4": Kind(
        lambda: nvfp4(True), {**_AUTOROUND, "data_type": "nv_fp", "group_size": 16}, ""
    ),
    "quark": Kind(
        lambda: either(
            mx(False, "weight"), fp8(Draw(0, True, FLOAT), "tensor", True), ("down_proj",)
        ),
        {
            "quant_method": "quark",
            "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
            "global_quant_config": {
                "weight": {
                    "dtype": "fp4",
                    "qscheme": "per_group",
                    "group_size": 32,
                    "scale_format": "e8m0",
                }
            },
            "layer_quant_config": {
                "*down_proj": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
            },
            "exclude": ["lm_head"],
        },
        "",
    ),
    "modelopt int8": Kind(
        lambda: smooth_int8(Integers(8, -1, True, FLOAT)),
        {**_MODELOPT, "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "",
    ),
}

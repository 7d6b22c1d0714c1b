"""Writers of quantised Hugging Face checkpoints, number by number from each format's document.

`write_quantized(kind, ...)` fills a tiny Llama with random integers and scales and writes it as
that quantiser would, and beside it the float32 checkpoint that it means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from makers.engines import write_tiny_checkpoint
from makers.family_models import save_family

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NATURAL = tuple(range(8))
INPUT_SCALE = 0.02
Written = dict[str, Tensor]


class Pair(NamedTuple):
    """quantized: the directory to build from; plain: the float32 checkpoint it stands for."""

    quantized: Path
    plain: Path


def pack_last(values: np.ndarray[Any, Any], order: tuple[int, ...]) -> Tensor:
    """int32 words: nibble i of word w is values[..., 8 * w + order[i]], in [0, 15]."""
    words = np.zeros((*values.shape[:-1], values.shape[-1] // 8), np.uint32)
    for i in range(8):
        words |= values[..., order[i] :: 8].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32))


class Draw:
    """Random linears: u in [0, 15], a zero point and a scale for each group."""

    def __init__(self, group: int, symmetric: bool, dtype: torch.dtype, seed: int = 7) -> None:
        self.rng = np.random.default_rng(seed)
        self.group, self.symmetric, self.dtype = group, symmetric, dtype

    def int4(self, out: int, inn: int) -> tuple[Any, Any, Tensor, Tensor]:
        groups = inn // self.group
        u = self.rng.integers(0, 16, (out, inn))
        z = self.rng.integers(5, 12, (out, groups))
        if self.symmetric:
            z = np.full((out, groups), 8)
        s = torch.from_numpy(self.rng.uniform(0.1, 0.3, (out, groups)) / inn**0.5).to(self.dtype)
        each = np.repeat(np.arange(groups), self.group)
        weight = torch.from_numpy(u - z[:, each]).double() * s.double()[:, each]
        return u, z, s, weight.float()

    def fp8(self, out: int, inn: int) -> Tensor:
        values = torch.from_numpy(self.rng.normal(0, 100, (out, inn))).clamp(-448, 448)
        return values.to(torch.float8_e4m3fn)

    def scale(self, inn: int) -> float:
        """A scale of an FP8 weight whose values are of about 100."""
        return float(self.rng.uniform(0.7, 1.3) / 100 / inn**0.5)


Writer = Callable[[str, int, int], tuple[Written, Tensor]]


def awq(draw: Draw) -> Writer:
    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, weight = draw.int4(out, inn)
        stored = {
            "qweight": pack_last(u.T, AWQ_ORDER),
            "qzeros": pack_last(z.T, AWQ_ORDER),
            "scales": s.T.contiguous(),
        }
        return stored, weight

    return write


def awq_gemv(draw: Draw) -> Writer:
    """The widths of zeros and scales are rounded up as calculate_zeros_width does for groups."""

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, weight = draw.int4(out, inn)
        multiple = {32: 4, 64: 2}.get(draw.group, 1)
        width = -(-(inn // draw.group) // 8)
        width = -(-width // multiple) * multiple * 8
        zeros = np.zeros((out, width), z.dtype)
        zeros[:, : z.shape[1]] = z
        scales = torch.zeros(out, width, dtype=s.dtype)
        scales[:, : s.shape[1]] = s
        stored = {
            "qweight": pack_last(u, NATURAL),
            "qzeros": pack_last(zeros, NATURAL),
            "scales": scales,
        }
        return stored, weight

    return write


def gptq(draw: Draw, stored_less: int, with_bias: bool = True) -> Writer:
    """with_bias: zeros, as AutoGPTQ adds them; AutoRound does not, and leaves g_idx out too."""

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, weight = draw.int4(out, inn)
        stored = {
            "qweight": pack_last(u, NATURAL).T.contiguous(),  # down the inputs
            "qzeros": pack_last(z.T - stored_less, NATURAL),
            "scales": s.T.contiguous(),
        }
        if with_bias:
            stored["g_idx"] = torch.arange(inn, dtype=torch.int32) // draw.group
            stored["bias"] = torch.zeros(out, dtype=torch.float16)
        return stored, weight

    return write


def packed(draw: Draw) -> Writer:
    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, z, s, weight = draw.int4(out, inn)
        stored = {
            "weight_packed": pack_last(u, NATURAL),
            "weight_scale": s,
            "weight_shape": torch.tensor([out, inn]),
        }
        if not draw.symmetric:
            stored["weight_zero_point"] = pack_last(z.T, NATURAL).T.contiguous()  # along dim 0
        return stored, weight

    return write


def modelopt_int4(draw: Draw, with_factor: tuple[str, ...]) -> Writer:
    factors: dict[str, Tensor] = {}

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        u, _, s, weight = draw.int4(out, inn)
        nibbles = (u - 8) & 0xF  # two's complement
        both = torch.from_numpy((nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8))
        stored = {"weight": both, "weight_scale": s}
        *layer, name = module.split(".")
        if name in with_factor:
            key = ".".join(layer)  # q, k, v share one, and gate and up
            key += name if name in ("o_proj", "down_proj") else ""
            random = torch.from_numpy(draw.rng.uniform(0.5, 2, inn)).to(torch.float16)
            stored["pre_quant_scale"] = factors.setdefault(key, random).clone()
            weight = weight * stored["pre_quant_scale"].float()
        return stored, weight

    return write


def fp8(
    draw: Draw,
    scales: str,
    inputs: bool,
    words: tuple[str, str] = ("weight_scale", "input_scale"),
    dtype: torch.dtype = torch.bfloat16,
) -> Writer:
    """scales: "shared" by q, k, v and gate, up; one each in "tensor"; one a row in "channel", in
    `dtype`. words: what the scales of weights and of inputs are called.
    """
    shared: dict[str, float] = {}

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        q = draw.fp8(out, inn)
        layer, _, name = module.rpartition(".")
        if scales == "channel":
            rows = [draw.scale(inn) for _ in range(out)]
            scale = torch.tensor(rows, dtype=dtype).view(out, 1)
        else:
            key = layer + (name if name in ("o_proj", "down_proj") else "")
            own = draw.scale(inn)
            value = shared.setdefault(key, own) if scales == "shared" else own
            scale = torch.tensor(value)
        stored = {"weight": q, words[0]: scale}
        if inputs:
            stored[words[1]] = torch.tensor(INPUT_SCALE)
        return stored, q.float() * scale.float()

    return write


def w4a8(draw: Draw) -> Writer:
    """ModelOpt's INT4 AWQ with the scales of its product's FP8, which change no weight."""
    int4 = modelopt_int4(draw, ("o_proj", "down_proj"))

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        stored, weight = int4(module, out, inn)
        largest = float(stored["weight_scale"].max()) * 8
        entering = {"input_scale": torch.tensor(INPUT_SCALE)}
        return {**stored, "weight_scale_2": torch.tensor(largest / 448), **entering}, weight

    return write


def int8(draw: Draw, in_rows: bool, shape: tuple[int, ...] = (-1, 1)) -> Writer:
    """A scale for each row, in `shape`, or one for a tensor."""

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        q = torch.from_numpy(draw.rng.integers(-128, 128, (out, inn)).astype(np.int8))
        rows = draw.rng.uniform(0.5, 1.5, out if in_rows else 1) / 75 / inn**0.5
        scale = torch.from_numpy(rows).to(draw.dtype)
        return {"weight": q, "weight_scale": scale.view(shape)}, q.float() * scale.float().view(
            -1, 1
        )

    return write


def ct_config(weights: dict[str, Any], inputs: dict[str, Any] | None, stored: str) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


class Kind(NamedTuple):
    """config: the quantization_config; form: what the engine must be built as."""

    writer: Callable[[], Writer]
    config: dict[str, Any]
    form: str
    has_zero_point: bool = False


HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
_AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 64}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
_FP8 = {"num_bits": 8, "type": "float"}
_MODELOPT = {"quant_method": "modelopt"}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_TOKENS = {**_INT8, "strategy": "token", "dynamic": True}
_AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "data_type": "int"}
_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
KINDS: dict[str, Kind] = {
    "awq": Kind(lambda: awq(Draw(64, False, HALF)), {**_AWQ, "zero_point": True}, "int4", True),
    "awq symmetric": Kind(lambda: awq(Draw(64, True, HALF)), {**_AWQ, "zero_point": False}, "int4"),
    "awq g128": Kind(
        lambda: awq(Draw(128, False, HALF)),
        {**_AWQ, "zero_point": True, "group_size": 128},
        "int4",
        True,
    ),
    "awq gemv g64": Kind(
        lambda: awq_gemv(Draw(64, False, HALF)),
        {**_AWQ, "version": "gemv", "zero_point": True},
        "int4",
        True,
    ),
    "gptq v1": Kind(lambda: gptq(Draw(64, True, HALF), 1), {**_GPTQ, "sym": True}, "int4"),
    "gptq v1 asymmetric": Kind(
        lambda: gptq(Draw(64, False, HALF), 1),
        {**_GPTQ, "sym": False, "desc_act": True},
        "int4",
        True,
    ),
    "gptq v2": Kind(
        lambda: gptq(Draw(64, False, FLOAT), 0),
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        "int4",
        True,
    ),
    "gptq v2 symmetric": Kind(
        lambda: gptq(Draw(64, True, HALF), 0),
        {**_GPTQ, "sym": True, "checkpoint_format": "gptq_v2"},
        "int4",
    ),
    "compressed-tensors w4a16": Kind(
        lambda: packed(Draw(64, True, BRAIN)),
        ct_config({**_INT4, "symmetric": True}, None, "pack-quantized"),
        "int4",
    ),
    "compressed-tensors w4a16 asymmetric": Kind(
        lambda: packed(Draw(64, False, BRAIN)),
        ct_config({**_INT4, "symmetric": False}, None, "pack-quantized"),
        "int4",
        True,
    ),
    "compressed-tensors fp8 static": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "shared", True),
        ct_config({**_FP8, "strategy": "tensor"}, {**_FP8, "dynamic": False}, "float-quantized"),
        "fp8",
    ),
    "compressed-tensors fp8, a scale each": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "tensor", True),
        ct_config({**_FP8, "strategy": "tensor"}, {**_FP8, "dynamic": False}, "float-quantized"),
        "fp8_rowwise",
    ),
    "compressed-tensors fp8 dynamic": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "channel", False),
        ct_config({**_FP8, "strategy": "channel"}, {**_FP8, "dynamic": True}, "float-quantized"),
        "fp8_rowwise",
    ),
    "modelopt fp8": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "shared", True), {**_MODELOPT, "quant_algo": "FP8"}, "fp8"
    ),
    "modelopt fp8 per channel": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "channel", False),
        {**_MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "fp8_rowwise",
    ),
    "modelopt int4 awq": Kind(
        lambda: modelopt_int4(
            Draw(64, True, FLOAT), ("o_proj", "down_proj", "gate_proj", "up_proj")
        ),
        {**_MODELOPT, "quant_algo": "W4A16_AWQ", "group_size": 64},
        "int4_awq",
    ),
    "modelopt w4a8 awq": Kind(
        lambda: w4a8(Draw(128, True, FLOAT)),
        {**_MODELOPT, "quant_algo": "W4A8_AWQ", "group_size": 128},
        "w4a8_awq",
    ),
    "compressed-tensors int8": Kind(
        lambda: int8(Draw(0, True, BRAIN), True),
        ct_config({**_INT8, "strategy": "channel"}, _TOKENS, "int-quantized"),
        "int8",
    ),
    "compressed-tensors int8, a scale each": Kind(
        lambda: int8(Draw(0, True, HALF), False, (1,)),
        ct_config({**_INT8, "strategy": "tensor"}, None, "naive-quantized"),
        "int8",
    ),
    "modelopt int8": Kind(
        lambda: int8(Draw(0, True, FLOAT), True, (-1,)),
        {**_MODELOPT, "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "int8",
    ),
    "autofp8": Kind(
        lambda: fp8(Draw(0, True, FLOAT), "tensor", True),
        {**_STATIC, "ignored_layers": ["lm_head"]},
        "fp8_rowwise",
    ),
    "transformers fp8": Kind(
        lambda: fp8(
            Draw(0, True, FLOAT), "shared", True, words=("weight_scale_inv", "activation_scale")
        ),
        {**_STATIC, "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
        "fp8",
    ),
    "fbgemm fp8": Kind(
        lambda: fp8(Draw(0, True, FLOAT, seed=8), "channel", False, dtype=FLOAT),
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["lm_head"],
        },
        "fp8_rowwise",
    ),
    "auto-round": Kind(
        lambda: gptq(Draw(64, True, HALF), 1, with_bias=False),
        {**_AUTOROUND, "sym": True, "packing_format": "auto_round:auto_gptq"},
        "int4",
    ),
    "auto-round asymmetric": Kind(
        lambda: gptq(Draw(64, False, HALF), 0, with_bias=False),
        {**_AUTOROUND, "sym": False, "packing_format": "auto_round"},
        "int4",
        True,
    ),
    "auto-round awq": Kind(
        lambda: awq(Draw(64, False, HALF)),
        {**_AUTOROUND, "sym": False, "packing_format": "auto_round:auto_awq"},
        "int4",
        True,
    ),
}


# Endings of the modules that are quantised.
LINEARS = (
    *("_proj", ".w1", ".w2", ".w3", ".in_proj_qkv", ".in_proj_z", ".in_proj_qkvz"),
    *(".query_key_value", ".attention.dense", "_4h", "_to_h"),
)


def write_quantized(
    kind: str,
    path: Path,
    edit: Callable[[Written], None] = lambda tensors: None,
    dtype: str = "float16",
    family: str | None = None,
    quantises: Callable[[str], bool] = lambda module: module.endswith(LINEARS),
    kinds: Mapping[str, Kind] = KINDS,
    **config_changes: Any,
) -> Pair:
    """Both checkpoints under `path`; `edit` changes the stored tensors, the rest the config.

    family: of family_models.FAMILIES, instead of the tiny Llama. quantises: by a module's name.
    """
    chosen = kinds[kind]
    plain, quantized = path / "plain", path / kind.replace(" ", "-")
    for directory in (plain, quantized):
        if family is None:
            write_tiny_checkpoint(directory, dtype=dtype)
        else:
            save_family(family, directory)
    stored: Written = {}
    meant: Written = {}
    writer = chosen.writer()
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not quantises(module):
            stored[name], meant[name] = tensor, tensor.float()
            continue
        tensors, meant[name] = writer(module, *tensor.shape)
        stored |= {f"{module}.{key}": value for key, value in tensors.items()}
    edit(stored)
    save_file(meant, plain / "model.safetensors")
    save_file({k: t.contiguous() for k, t in stored.items()}, quantized / "model.safetensors")
    settings = {**chosen.config, **config_changes}
    for directory in (plain, quantized):
        config = json.loads((directory / "config.json").read_text())
        config.pop("dtype", None)
        config["torch_dtype"] = "float32" if directory == plain else dtype
        if directory == plain:
            pass
        elif settings["quant_method"] == "modelopt":
            settings.pop("quant_method")
            text = json.dumps({"producer": {"name": "modelopt"}, "quantization": settings})
            (directory / "hf_quant_config.json").write_text(text)
        else:
            config["quantization_config"] = settings
        (directory / "config.json").write_text(json.dumps(config))
    return Pair(quantized, plain)


def edit_config(path: Path, **changes: Any) -> None:
    data = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(data))

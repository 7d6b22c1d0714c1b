"""A writer of bitsandbytes' checkpoints, number by number from its document."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from makers.quantized_writers import Kind, Writer, Written

# Of a normal distribution: QLoRA (Dettmers et al., 2023), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
OFFSET = 0.125


def table(nested: bool, stored_as: torch.dtype = torch.uint8) -> Writer:
    """nested: scales of blocks of 64 are bytes too, 256 of them with a scale of their own."""
    rng = np.random.default_rng(15)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        codes = rng.integers(0, 16, out * inn)
        weight = torch.tensor(NF4, dtype=torch.float64)[torch.from_numpy(codes)].view(-1, 64)
        packed = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8))
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [out, inn]}
        stored = {"weight.quant_map": torch.tensor(NF4)}
        if nested:
            bytes_ = torch.from_numpy(rng.integers(0, 256, len(weight)).astype(np.uint8))
            map_ = torch.from_numpy(np.sort(rng.uniform(-1, 1, 256))).float()
            own = torch.from_numpy(rng.uniform(0.01, 0.1, -(-len(weight) // 256))).float()
            stored |= {"weight.absmax": bytes_, "weight.nested_quant_map": map_}
            stored |= {"weight.nested_absmax": own}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": OFFSET}
            each = own.double()[torch.arange(len(weight)) // 256]
            scale = map_.double()[bytes_.long()] * each + OFFSET
        else:
            stored["weight.absmax"] = torch.from_numpy(rng.uniform(0.05, 0.2, len(weight))).float()
            scale = stored["weight.absmax"].double()
        raw = json.dumps(state).encode()
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
        stored["weight"] = packed.view(stored_as).view(-1, 1)
        return stored, (weight * scale[:, None]).float().view(out, inn)

    return write


def row_int8() -> Writer:
    rng = np.random.default_rng(16)

    def write(module: str, out: int, inn: int) -> tuple[Written, Tensor]:
        q = torch.from_numpy(rng.integers(-127, 128, (out, inn))).to(torch.int8)
        largest = torch.from_numpy(rng.uniform(0.1, 0.3, out)).float()
        weight = q.double() * largest.double()[:, None] / 127
        byte = torch.tensor(0, dtype=torch.uint8)
        return {"weight": q, "SCB": largest, "weight_format": byte}, weight.float()

    return write


_FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BITSANDBYTES: dict[str, Kind] = {
    "nf4": Kind(lambda: table(False), _FOUR, ""),
    "nf4 nested": Kind(lambda: table(True), {**_FOUR, "bnb_4bit_use_double_quant": True}, ""),
    "nf4 stored as bfloat16": Kind(lambda: table(True, torch.bfloat16), _FOUR, ""),
    "llm.int8": Kind(row_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, ""),
}

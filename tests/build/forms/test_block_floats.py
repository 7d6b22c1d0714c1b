"""Blocks of small floats: each code against the formats' words, and modelopt's own bytes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from enginehouse.build.forms.block_floats import (
    FP8_BLOCK,
    MX_BLOCK,
    NVFP4_BLOCK,
    Block,
    dequantize_blocks,
    from_e8m0,
    pack_e2m1,
    round_e2m1,
    to_e8m0,
    unpack_e2m1,
)
from enginehouse.build.forms.block_quantization import (
    quantize_fp8_blocks,
    quantize_mxfp8,
    quantize_nvfp4,
)
from enginehouse.runtime.errors import QuantizationError
from makers.paths import CONTRACT

MODELOPT = json.loads((CONTRACT / "hf" / "block_floats-modelopt-0.47.json").read_text())


def e2m1_by_hand(code: int) -> float:
    """MX 1.0, section 5.3.3: a sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def test_every_byte_holds_two_e2m1_the_even_input_low() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    found = unpack_e2m1(packed)
    wanted = [value for byte in range(256) for value in map(e2m1_by_hand, (byte & 15, byte >> 4))]
    assert found.flatten().tolist() == wanted
    assert torch.equal(pack_e2m1(found), packed)


def test_e2m1_is_the_nearest_value_and_the_even_code_of_two() -> None:
    values = torch.arange(-1100, 1101) / 128  # every tie is among them, and beyond 6
    found = round_e2m1(values.clone()).tolist()
    codes = range(8)
    for value, rounded in zip(values.tolist(), found, strict=True):
        best = min(codes, key=lambda code: (abs(e2m1_by_hand(code) - abs(value)), code % 2))
        assert rounded == math.copysign(e2m1_by_hand(best), value), value


def test_every_e8m0_is_a_power_of_two_and_255_is_nan() -> None:
    powers = from_e8m0(torch.arange(256, dtype=torch.uint8))
    assert powers[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert powers[255].isnan()
    assert torch.equal(to_e8m0(powers[1:255]), torch.arange(1, 255, dtype=torch.uint8))
    above = torch.nextafter(powers[1:254], torch.tensor(math.inf))
    assert torch.equal(to_e8m0(above), torch.arange(2, 255, dtype=torch.uint8))


def by_hand(values: Tensor, scale: Tensor, block: Block) -> Tensor:
    result = torch.empty_like(values)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            result[i, j] = values[i, j] * scale[i // block[0], j // block[1]]
    return result


@pytest.mark.parametrize(("name", "block"), [("nvfp4", NVFP4_BLOCK), ("mxfp4", MX_BLOCK)])
def test_fp4_means_what_modelopt_says(name: str, block: Block) -> None:
    table = MODELOPT[name]
    q = torch.tensor(table["weight"], dtype=torch.uint8).view(2, -1)
    scale = torch.tensor(table["scale"], dtype=torch.uint8).view(2, -1)
    second = None
    if name == "nvfp4":
        scale, second = scale.view(torch.float8_e4m3fn), torch.tensor([table["second"]])
    found = dequantize_blocks(q, scale, block, second)
    assert torch.equal(found, torch.tensor(table["means"]))


def test_nvfp4_loses_less_than_modelopts_scales_and_has_its_second() -> None:
    weight, table = torch.tensor(MODELOPT["weight"]), MODELOPT["nvfp4"]
    found = quantize_nvfp4(weight)
    assert found.second is not None and float(found.second) == table["second"]
    error = (dequantize_blocks(found.q, found.scale, NVFP4_BLOCK, found.second) - weight).square()
    theirs = (torch.tensor(table["means"]) - weight).square()
    of_blocks = (part.unflatten(1, (-1, 16)).sum(-1) for part in (error, theirs))
    ours_by_block, theirs_by_block = of_blocks
    assert bool((ours_by_block <= theirs_by_block * (1 + 1e-6)).all())
    assert float(error.sum()) < 0.9 * float(theirs.sum())


def test_mxfp8_is_modelopts_bytes() -> None:
    weight, table = torch.tensor(MODELOPT["weight"]), MODELOPT["mxfp8"]
    found = quantize_mxfp8(weight)
    assert found.q.view(torch.uint8).flatten().tolist() == table["weight"]
    assert found.scale.flatten().tolist() == table["scale"]
    means = dequantize_blocks(found.q, found.scale, MX_BLOCK)
    assert torch.equal(means, torch.tensor(table["means"]))


def test_fp8_blocks_may_end_before_128() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(5))
    weight[128:, 256:] = 0
    q, scale, _ = quantize_fp8_blocks(weight)
    assert scale.shape == (2, 3) and scale[1, 2] == 1
    for i in range(2):
        for j in range(3):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            wanted = block.abs().max() / 448 if (i, j) != (1, 2) else torch.tensor(1.0)
            assert scale[i, j] == wanted
            part = q[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert torch.equal(part.float(), (block / wanted).to(torch.float8_e4m3fn).float())
    found = dequantize_blocks(q, scale, FP8_BLOCK)
    assert torch.equal(found, by_hand(q.float(), scale, FP8_BLOCK))


def test_inputs_that_no_block_divides_are_refused() -> None:
    with pytest.raises(QuantizationError, match="in_features=24 cannot be cut into blocks of 16"):
        quantize_nvfp4(torch.ones(2, 24))
    with pytest.raises(QuantizationError, match="blocks of 32"):
        quantize_mxfp8(torch.ones(2, 48))


def test_zeros_stay_zeros_in_every_form() -> None:
    zeros = torch.zeros(4, 64)
    for made, block in (
        (quantize_nvfp4(zeros), NVFP4_BLOCK),
        (quantize_mxfp8(zeros), MX_BLOCK),
        (quantize_fp8_blocks(zeros), FP8_BLOCK),
    ):
        assert torch.equal(dequantize_blocks(made.q, made.scale, block, made.second), zeros)

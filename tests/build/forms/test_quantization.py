"""INT4 and FP8 against an unpacker and a rounding written from the format's words alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.build.forms.quantization import (
    check_finite,
    fp8_scale,
    quantize_fp8,
    quantize_int4,
    round_e4m3,
)
from enginehouse.runtime.checkpoint.packing import (
    dequantize_fp8,
    dequantize_int4,
    pack_int4,
    to_fp8,
    unpack_int4,
)
from enginehouse.runtime.errors import QuantizationError


def unpack_by_hand(packed: Tensor) -> list[list[int]]:
    """CONTRACT 3.3, step 3, byte by byte: low nibble row 2r, high nibble row 2r + 1."""
    rows: list[list[int]] = []
    for row in packed.tolist():
        for shift in (0, 4):
            nibbles = [(byte & 0xFF) >> shift & 0xF for byte in row]
            rows.append([n - 16 if n >= 8 else n for n in nibbles])
    return rows


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), pairs=st.integers(1, 9), columns=st.integers(1, 17))
def test_packed_nibbles_lie_where_the_format_says(seed: int, pairs: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (2 * pairs, columns), dtype=torch.int8, generator=generator)
    packed = pack_int4(q)
    assert packed.dtype == torch.int8 and packed.shape == (pairs, columns)
    assert unpack_by_hand(packed) == q.tolist()
    assert torch.equal(unpack_int4(packed), q)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [64, 128])
def test_int4_is_within_half_a_step_of_the_weight(
    group_size: int, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_int4(weight, group_size, scale_dtype)
    assert q.dtype == torch.int8 and q.min() >= -8 and q.max() <= 7
    assert scale.dtype == scale_dtype and scale.shape == (48, 256 // group_size)
    step = scale.float().repeat_interleave(group_size, dim=1)
    error = (dequantize_int4(pack_int4(q), scale) - weight).abs()
    clipped = ((q == 7) | (q == -8)).logical_and(weight.abs() > 7 * step)
    slack = weight.abs() * torch.finfo(scale_dtype).eps  # the scale's own rounding
    assert (clipped | (error <= step / 2 * 1.0001 + slack)).all()


@pytest.mark.parametrize("group_size", [64, 128])
def test_clipping_a_group_never_loses_more_than_it_gains(group_size: int) -> None:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_int4(weight, group_size, torch.float32)
    groups = weight.view(48, -1, group_size)
    full = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / full).round() * full - groups).abs().pow(3).sum(-1)
    ours = (dequantize_int4(pack_int4(q), scale).view_as(groups) - groups).abs().pow(3).sum(-1)
    assert (ours <= plain * 1.0001).all() and ours.sum() < 0.95 * plain.sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 128)
    weight[:, 64:] = 1.0
    q, scale = quantize_int4(weight, 64, torch.float16)
    assert torch.equal(dequantize_int4(pack_int4(q), scale)[:, :64], torch.zeros(2, 64))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(QuantizationError, match="in_features=100 .* groups of 64"):
        quantize_int4(torch.ones(2, 100), 64, torch.float32)


def e4m3_values() -> list[float]:
    """Every finite value, from the definition: 4 exponent bits with bias 7, 3 of mantissa."""
    values = []
    for exponent in range(16):
        for mantissa in range(8):
            if exponent == 15 and mantissa == 7:
                continue  # NaN
            significand = mantissa / 8 + (exponent > 0)
            values.append(significand * 2.0 ** (max(exponent, 1) - 7))
    return values


def test_fp8_rounds_to_the_nearest_value_of_the_format() -> None:
    table = torch.tensor(sorted({s * v for v in e4m3_values() for s in (1, -1)}))
    x = torch.randn(2000, generator=torch.Generator().manual_seed(2)) * 60
    nearest = (x.unsqueeze(1) - table).abs().amin(dim=1)
    assert torch.equal((to_fp8(x).float() - x).abs(), nearest)


def test_fp8_saturates_instead_of_giving_nan() -> None:
    assert to_fp8(torch.tensor([500.0, -1e9])).float().tolist() == [448.0, -448.0]


def test_round_e4m3_is_the_cast_and_back() -> None:
    """Every number of e4m3, what lies between two and beside it, and numbers of every size."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (every[1:] + every[:-1]) / 2
    spread = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    spread *= torch.exp2(torch.linspace(-20, 12, 4096))
    near = [torch.nextafter(between, torch.tensor(end)) for end in (0.0, 1000.0)]
    values = torch.cat([every, between, *near, spread, torch.tensor([1e9])])
    values = torch.cat([values, -values])
    assert torch.equal(round_e4m3(values.clone()), to_fp8(values).float())


def test_fp8_maps_the_largest_weight_to_448() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    scale = fp8_scale(float(weight.abs().amax()))
    q = quantize_fp8(weight, scale)
    assert q.float().abs().max() == 448.0
    back = dequantize_fp8(q, torch.tensor([scale]))
    assert ((back - weight).abs() <= weight.abs() / 16 + scale * 2**-10).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    weight[2, 1] = bad
    with pytest.raises(QuantizationError, match="model.layers.0.x holds NaN or infinite"):
        check_finite("model.layers.0.x", weight)

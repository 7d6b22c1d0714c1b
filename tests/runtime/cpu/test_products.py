"""One linear of each form, through the kernels' product and through torch's in float32.

Inputs are numbers that bfloat16 holds and sums are of float32 in both: only their order differs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from enginehouse.build.forms.quantization import quantize_fp8_rowwise, quantize_int4
from enginehouse.runtime.checkpoint.packing import pack_int4, quantize_int8, to_fp8
from enginehouse.runtime.cpu.compiler import SOURCE, find_compiler
from enginehouse.runtime.cpu.instructions import choose_instructions, compiler_flags
from enginehouse.runtime.cpu.library import FORMS, INPUTS, PARTS
from enginehouse.runtime.cpu.linear_forms import linear_of
from enginehouse.runtime.cpu.packed_linear import array_of, packed_linear
from enginehouse.runtime.torch.linear import make_linear
from makers.cpp_compiler import needs_compiler

pytestmark = needs_compiler
OUT = 48  # half a block more than one


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """float32, which bfloat16 holds."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().float()


def dense() -> dict[str, Tensor]:
    return {"weight": numbers(OUT, 240).bfloat16()}


def int4() -> dict[str, Tensor]:
    q, scale = quantize_int4(numbers(OUT, 256), 64, torch.bfloat16)
    return {"weight": pack_int4(q), "weights_scaling_factor": scale}


def int4_shifted() -> dict[str, Tensor]:
    """With zero points, and input factors that leave the inputs in bfloat16."""
    factor = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(64).bfloat16()
    return {**int4(), "zero": numbers(4, OUT, seed=2), "prequant_scaling_factor": factor}


def w4a8() -> dict[str, Tensor]:
    factor = (numbers(256, seed=3).abs() + 0.5).bfloat16()
    scales = {"weights_scaling_factor_2": 0.01, "activation_scaling_factor": 0.02}
    told = {name: torch.tensor([value]) for name, value in scales.items()}
    return {**int4(), "prequant_scaling_factor": factor, **told}


def int8() -> dict[str, Tensor]:
    q, scale = quantize_int8(numbers(OUT, 240).bfloat16())
    return {"weight": q, "per_channel_scale": scale}


def int8_of_ranks() -> dict[str, Tensor]:
    parts = [quantize_int8(part) for part in numbers(OUT, 256).bfloat16().chunk(2, dim=1)]
    scale = torch.stack([part.scale for part in parts], dim=1)
    return {"weight": torch.cat([part.q for part in parts], dim=1), "per_channel_scale": scale}


def fp8() -> dict[str, Tensor]:
    scales = {"weights_scaling_factor": 0.004, "activation_scaling_factor": 0.003}
    told = {name: torch.tensor([value]) for name, value in scales.items()}
    return {"weight": to_fp8(numbers(OUT, 240) / 0.004), **told}


def fp8_rowwise() -> dict[str, Tensor]:
    q, scale = quantize_fp8_rowwise(numbers(OUT, 240))
    return {"weight": q, "per_channel_scale": scale}


@pytest.fixture(scope="module", params=["best", "plain"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """products.cpp, for the best instruction set of this CPU and for any CPU."""
    instructions = choose_instructions() if request.param == "best" else "plain"
    made = tmp_path_factory.mktemp("products") / "products"
    flags = ["-std=c++20", "-O0", "-Wno-psabi", "-pthread", *compiler_flags(instructions)]
    source = Path(__file__).with_name("products.cpp")
    command = [*find_compiler(), *flags, f"-I{SOURCE}", str(source), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return made


def product(program: Path, module: dict[str, Tensor], x: Tensor) -> Tensor:
    shape, arrays = packed_linear(linear_of(module, "bf16"))
    form, entering = FORMS.index(shape.form), INPUTS.index(shape.input)
    sizes = (form, shape.inputs, shape.out, shape.group, entering, shape.narrow_scales)
    told = np.array([len(x), *sizes, x.shape[1]], np.int32).tobytes()
    for part in PARTS:
        data = array_of(*arrays[part]).tobytes() if part in arrays else b""
        told += np.array(len(data), np.int32).tobytes() + data
    told += x.numpy().tobytes()
    done = subprocess.run([program], input=told, capture_output=True, check=True, timeout=60)
    return torch.tensor(np.frombuffer(done.stdout, np.float32)).view(len(x), shape.out)[:, :OUT]


@pytest.mark.parametrize(
    "module", [dense, int4, int4_shifted, w4a8, int8, int8_of_ranks, fp8, fp8_rowwise]
)
def test_a_product_of_each_form_is_torchs(
    program: Path, module: Callable[[], dict[str, Tensor]]
) -> None:
    tensors = {**module(), "bias": numbers(OUT, seed=4)}
    x = numbers(13, tensors["weight"].shape[1], seed=5)
    truth = make_linear([tensors], torch.float32)(x)
    found = product(program, tensors, x)
    assert (found - truth).abs().max() < 2e-6 * truth.abs().max()
    assert torch.equal(product(program, tensors, x[:1]), found[:1])

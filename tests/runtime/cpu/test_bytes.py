"""Numbers of one byte, rounded to and widened by the kernels, are exactly torch's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from enginehouse.runtime.checkpoint.packing import to_fp8
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import INSTRUCTIONS, available, cpu_words
from makers.cpp_compiler import compile_program, needs_compiler

pytestmark = needs_compiler
BYTES = torch.arange(256, dtype=torch.uint8)
E4M3 = BYTES.view(torch.float8_e4m3fn).float()


def rounded_values() -> torch.Tensor:
    """float32 [a multiple of 16]: every e4m3, what lies between two, beside that, and beyond."""
    finite = E4M3[E4M3.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    steps = torch.arange(-130, 130, 0.25)
    near = [torch.nextafter(middles, torch.tensor(to)) for to in (-1e9, 1e9)]
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 30
    values = torch.cat([finite, middles, *near, steps, drawn, torch.tensor([1e9, -1e9, 464.0])])
    return values[: len(values) // 16 * 16]


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_bytes_are_rounded_to_and_read_as_torch_does(tmp_path: Path, instructions: str) -> None:
    if instructions not in available(cpu_words()):
        pytest.skip(f"this CPU has no {instructions}")
    source = Path(__file__).with_name("bytes.cpp")
    made = compile_program(source, tmp_path / "bytes", find_compiler(), instructions, "-O1")
    values = rounded_values()
    told = subprocess.run([made], input=values.numpy().tobytes(), capture_output=True, timeout=60)
    found = np.frombuffer(told.stdout, dtype=np.uint8)

    codes, numbers = found[: 2 * len(values)].reshape(-1, 2, 16), found[2 * len(values) :]
    fp8, int8 = (torch.tensor(codes[:, i].ravel()) for i in (0, 1))
    assert torch.equal(E4M3[fp8.long()], to_fp8(values).float())  # zero has two bytes
    assert torch.equal(int8.view(torch.int8), values.round().clamp(-128, 127).to(torch.int8))

    read = torch.tensor(numbers.view(np.float32).reshape(2, 16, 2, 16))
    first, second = read[:, :, 0].flatten(1), read[:, :, 1].flatten(1).flip(1)
    finite = E4M3.isfinite()
    for each in (first, second):
        assert torch.equal(each[0][finite], E4M3[finite])
        assert torch.equal(each[1], BYTES.view(torch.int8).float())

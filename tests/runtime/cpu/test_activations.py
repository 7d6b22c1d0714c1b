"""The kernels' activations are torch's, within float32's rounding."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import INSTRUCTIONS, available, cpu_words
from enginehouse.runtime.torch.mlp import activated
from makers.cpp_compiler import compile_program, needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_activations_are_torchs(tmp_path: Path, instructions: str) -> None:
    if instructions not in available(cpu_words()):
        pytest.skip(f"this CPU has no {instructions}")
    source = Path(__file__).with_name("activations.cpp")
    made = compile_program(source, tmp_path / "activations", find_compiler(), instructions, "-O1")
    values = torch.cat([torch.arange(-20, 20, 1 / 64), torch.tensor([-1e9, -90.0, 0.0, 1e9] * 4)])
    told = subprocess.run([made], input=values.numpy().tobytes(), capture_output=True, timeout=60)
    found = torch.tensor(np.frombuffer(told.stdout, np.float32)).view(-1, 3, 16)
    for i, name in enumerate(("silu", "gelu", "gelu_erf")):
        wanted = activated(values.double(), name).float()
        torch.testing.assert_close(found[:, i].flatten(), wanted, atol=2e-6, rtol=2e-6)

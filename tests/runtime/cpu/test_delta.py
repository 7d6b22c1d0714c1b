"""The kernels' linear attention against loops over one token at a time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from enginehouse.runtime.config_parts import Delta
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import INSTRUCTIONS, available, cpu_words
from makers.cpp_compiler import compile_program, needs_compiler
from makers.delta_rule import by_loops

pytestmark = needs_compiler
TOKENS = 29


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_states_go_on_as_by_loops(tmp_path: Path, instructions: str) -> None:
    if instructions not in available(cpu_words()):
        pytest.skip(f"this CPU has no {instructions}")
    delta = Delta(frozenset([0]), 2, 6, key_size=16, value_size=80, kernel=4)
    draws = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws)

    heads = (delta.key_heads, delta.group)
    weight, speed, bias = drawn(2, delta.mixed, 4) * 0.5, drawn(*heads).exp(), drawn(*heads)
    norm = 1 + 0.1 * drawn(delta.value_size)
    rows, rates = drawn(2, TOKENS, 2, delta.rows), drawn(2, TOKENS, 2, 2, delta.group)
    sizes = np.array([2, delta.group, 16, 80, 4, TOKENS], np.int32)
    wide = functional.pad(rates.flatten(2), [0, 4])  # 12 of a whole vector's 16
    told = (weight.mT.contiguous(), speed, bias, norm, rows, wide)
    source = Path(__file__).with_name("delta.cpp")
    made = compile_program(source, tmp_path / "delta", find_compiler(), instructions, "-O1")
    data = sizes.tobytes() + b"".join(each.numpy().tobytes() for each in told)
    done = subprocess.run([made], input=data, capture_output=True, timeout=60, check=True)
    found = torch.tensor(np.frombuffer(done.stdout, np.float32)).view(2, 2, TOKENS, *heads, -1)
    assert torch.equal(found[0], found[1]), "in steps, and in slots that others had"
    mixed, gates = rows.split([delta.mixed, delta.values], dim=-1)
    learns, fades = rates.double().unbind(3)
    decay = -speed.double() * functional.softplus(fades + bias.double())
    for i in range(2):
        read, _ = by_loops(delta, weight.flatten(0, 1), mixed[i], decay[i], learns[i].sigmoid())
        normed = read * (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
        wanted = normed * functional.silu(gates[i].double()).view(normed.shape)
        torch.testing.assert_close(found[0, i], wanted.float(), atol=2e-4, rtol=2e-4)

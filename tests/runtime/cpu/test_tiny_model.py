"""A tiny model in C++ alone: with sanitizers looking on, and on ARM64 CPUs that are emulated."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import available, cpu_words
from makers.cpp_compiler import compile_program, needs_compiler

pytestmark = needs_compiler
SOURCE = Path(__file__).with_name("tiny_model.cpp")
BEST = available(cpu_words())[0]
# What looks on, and at the best set alone: the plain one reads and writes where that does, and GCC
# takes as long again over it. What asks of every pointer whether it is null or aligned would double
# the time; what is undefined ends the program (SIGILL), and who wants to read what it was leaves
# the second flag out.
LOOKING_ON = (
    "-fsanitize=address,bounds,float-cast-overflow,integer-divide-by-zero,shift"
    ",signed-integer-overflow",
    "-fno-sanitize-recover=all",
)
OF_GCC = (
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fsanitize-undefined-trap-on-error",
)
# CPUs that have a set and nothing beyond it: what else is used is an illegal instruction there.
ARM64 = {"neon_bf16": "max", "neon_dotprod": "cortex-a76", "plain": "cortex-a53"}
ARM64_LIBRARIES = Path("/usr/aarch64-linux-gnu")
# Of the largest logit: the last bit of a sum may decide to what an activation is rounded.
CLOSE = 0.01


def run(command: Sequence[str]) -> Tensor:
    """The logits that the program prints, after the word that it is content."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout[:6]) == (0, "alike\n"), done.stdout[:9] + done.stderr
    return torch.tensor([float(word) for word in done.stdout.split()[1:]])


def sanitizing_compiler() -> list[str]:
    """g++ before others: it comes with its sanitizers."""
    return [found] if (found := shutil.which("g++")) else find_compiler()


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the program prints on this CPU, with sanitizers looking on where there are some."""
    command = sanitizing_compiler()
    flags = [] if "ziglang" in command else [*LOOKING_ON]
    flags += OF_GCC if command[0].endswith("/g++") else ()
    made = tmp_path_factory.mktemp("tiny") / "program"
    return run([compile_program(SOURCE, made, command, BEST, "-O0", *flags)])


def test_the_kernels_touch_nothing_that_is_not_theirs(logits: Tensor, tmp_path: Path) -> None:
    """Else the program would have ended; and without an instruction set the logits are the same."""
    if "ziglang" in sanitizing_compiler():
        pytest.skip("zig's compiler has no address sanitizer")
    plain = compile_program(SOURCE, tmp_path / "plain", find_compiler(), "plain", "-O0")
    assert_close(logits, run([plain]))


@pytest.mark.parametrize("instructions", ARM64)
def test_an_arm64_gives_the_logits(logits: Tensor, instructions: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no ziglang package: pip install 'enginehouse[compiler]'")
    if shutil.which("qemu-aarch64") is None or not ARM64_LIBRARIES.is_dir():
        pytest.skip("no emulated ARM64: apt-get install qemu-user libc6-arm64-cross")
    zig = [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline"]
    command = [*zig, "-target", "aarch64-linux-gnu"]
    made = compile_program(SOURCE, tmp_path / "tiny", command, instructions, "-Os")
    emulated = ["qemu-aarch64", "-cpu", ARM64[instructions], "-L", str(ARM64_LIBRARIES), made]
    assert_close(run(emulated), logits)


def assert_close(found: Tensor, truth: Tensor) -> None:
    assert (found - truth).abs().max() < CLOSE * truth.abs().max()
